"""What the project promises of secrets, the network and its dependencies, held over all stages.

Other promises stand where they are kept: pickled weights and code of models in
test_fetch_model.py, archives, scripts and paths of data in test_fetch_data.py, names from the Hub
and its answers in test_hub.py, markup of others in test_export.py.
"""

import os
import re
import shutil
import signal
import subprocess

import pytest
import quick
import yaml
from test_hub import NO_SOCKETS
from tiny import ROOT, make_workspace

pytestmark = pytest.mark.slow

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
SECRET = "marked-7f3a1c-never-shown"
NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")
SECRETS = dict.fromkeys(NAMES, SECRET)


def guard(workspace) -> None:
    """Make opening a socket an error in every stage, and in the processes that it forks."""
    (workspace / "stages/__init__.py").write_text(NO_SOCKETS)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A tiny pipeline, run to its end with tokens in its environment and without a network.

    Training is killed once, so that a checkpoint is there to look at too.
    """
    folder = make_workspace(tmp_path_factory.mktemp("guarded") / "ws", git=True)
    guard(folder)
    for name in STAGES:
        if name == "train":
            killed = quick.Stage(name, folder, CHECKPOINT_SECONDS="0", **SECRETS)
            assert killed.until(lambda: quick.sealed(folder)), killed.said
            killed.kill(signal.SIGKILL)
            killed.wait()
            shutil.copytree(folder / "checkpoints", folder / "kept_checkpoints")
        quick.run(name, folder, **SECRETS)
    (folder / "stages/__init__.py").write_text("")
    subprocess.run(["dvc", "init", "-q", "-f"], cwd=folder, check=True)
    environment = os.environ | SECRETS | {"DVC_NO_ANALYTICS": "1"}
    subprocess.run(["dvc", "commit", "-q", "--force"], cwd=folder, env=environment, check=True)
    return folder


def test_no_stage_opens_a_socket_offline(guarded):
    """Every one has run to its end under the guard."""
    assert all((guarded / f"{name}.log").exists() for name in STAGES)


def test_the_guard_sees_a_socket_in_a_stage(guarded, tmp_path):
    folder = tmp_path / "ws"
    shutil.copytree(guarded, folder)
    guard(folder)
    script = folder / "stages/fetch_data.py"
    script.write_text(
        script.read_text().replace(
            "\ndef main() -> None:\n", "\ndef main() -> None:\n    import socket; socket.socket()\n"
        )
    )
    stage = quick.Stage("fetch_data", folder)
    assert stage.wait() == 1
    assert "a socket was opened" in stage.said


def test_tokens_are_written_nowhere(guarded):
    looked_at = [file for file in guarded.rglob("*") if file.is_file()]
    names = {file.relative_to(guarded).parts[0] for file in looked_at}
    assert {"dvc.lock", "kept_checkpoints", "metrics", "models", "train.log"} <= names
    assert [file for file in looked_at if SECRET.encode() in file.read_bytes()] == []


def test_dvc_sends_no_telemetry():
    """In the project's own configuration, for people who never set anything."""
    shown = {}
    for key in ("core.analytics", "core.check_update"):
        done = subprocess.run(
            ["dvc", "config", "--project", key], cwd=ROOT, capture_output=True, text=True
        )
        shown[key] = done.stdout.strip()
    assert shown == {"core.analytics": "false", "core.check_update": "false"}


def test_workflow_audits_what_it_installs_and_holds_no_secret():
    text = (ROOT / ".github/workflows/ci.yml").read_text()
    workflow = yaml.safe_load(text)
    job = workflow["jobs"]["pipeline"]
    commands = [step.get("run", "") for step in job["steps"]]
    assert any("pip-audit" in command and "requirements.lock" in command for command in commands)
    # YAML reads the key `on` as true. pull_request_target would give forks the project's rights.
    assert workflow[True] == "pull_request"
    assert workflow["permissions"] == {"contents": "read"}
    assert "secrets." not in text
    # A tag can be moved to other code; a commit can not.
    uses = [step["uses"] for step in job["steps"] if "uses" in step]
    assert uses
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", name) for name in uses)
