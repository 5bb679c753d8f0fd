"""Two machines train together: two clones on one machine, with one local DVC remote."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import quick
from stubs import must
from test_ranks_ending import children, end_in_time
from test_resume import checkpoints, results, set_params
from tiny import append

from stages.shared.process import StageError
from stages.training.machines import how_many

pytestmark = pytest.mark.slow

SECONDS = 15.0


@pytest.fixture(scope="module")
def project(finished, tmp_path_factory) -> Path:
    """A repository in which train can start, with its rows and weights in a remote."""
    folder = tmp_path_factory.mktemp("machines") / "first"
    kept = shutil.ignore_patterns("adapter", "merged", "release", "*.log", "checkpoints")
    shutil.copytree(finished, folder, ignore=kept)
    set_params(folder, train={"batch_size": 4})
    append(folder / ".gitignore", "/tiny/\n*.log\n")
    must(folder, "git", "init", "-q", "-b", "main")
    must(folder, "dvc", "remote", "add", "-q", "-d", "disk", str(folder.parent / "remote"))
    must(folder, "dvc", "commit", "-q", "--force", "prepare", "quantize")
    must(folder, "dvc", "push", "-q", "data/prepared", "models/quantized")
    must(folder, "git", "add", "-A")
    must(folder, "git", "commit", "-qm", "prepared")
    return folder


@pytest.fixture(scope="module")
def joiner(project) -> Path:
    """A clone that has pulled nothing."""
    folder = project.parent / "second"
    must(project.parent, "git", "clone", "-q", str(project), str(folder))
    return folder


@pytest.fixture(scope="module")
def undisturbed(project, tmp_path_factory) -> Path:
    """The same on one machine with two devices."""
    folder = tmp_path_factory.mktemp("undisturbed") / "ws"
    shutil.copytree(project, folder)
    clean(folder)
    quick.run("train", folder, CPU_RANKS="2")
    return folder


@pytest.fixture
def first(project) -> Path:
    clean(project)
    return project


def clean(folder: Path) -> None:
    for name in ("models/adapter", "checkpoints", "metrics"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "metrics").mkdir()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def environment(port: int) -> dict[str, str]:
    # As with machines that reach each other by another interface than lo.
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}


def join(folder: Path, port: int, **env: str) -> quick.Stage:
    return quick.Stage(
        "tools.join", folder, arguments=(f"127.0.0.1:{port}",), **environment(port) | env
    )


def start(first: Path, joiner: Path, **env: str) -> tuple[quick.Stage, quick.Stage]:
    port = free_port()
    stage = quick.Stage("train", first, MACHINES="2", **environment(port) | env)
    return stage, join(joiner, port, **env)


def test_two_machines_give_the_bytes_of_one_with_two_devices(first, joiner, undisturbed):
    stage, other = start(first, joiner)
    assert stage.wait() == 0, stage.said + other.said
    assert other.wait() == 0, other.said
    waits = "train: waiting for 1 more of 2 machines: python -m tools.join 127.0.0.1:"
    assert stage.said.startswith(waits)
    assert [line for line in other.said.splitlines() if line.startswith("join: ")][1:] == [
        "join: pulling data/prepared and models/quantized",
        "join: ranks 1 to 1 of 2 run here",
        "join: the training has ended",
    ]
    assert results(first) == results(undisturbed)
    # Nothing remains on the other machine.
    assert not (joiner / "models/adapter").exists()
    assert not list((joiner / "checkpoints").glob("*"))


def test_a_run_goes_on_on_two_machines_by_a_schedulers_names(first, joiner, undisturbed):
    stage = quick.Stage("train", first, CPU_RANKS="2", CHECKPOINT_SECONDS="0")
    assert stage.until(lambda: bool(checkpoints(first))), stage.said
    stage.kill(signal.SIGTERM)
    assert stage.wait() == 1
    named = environment(free_port()) | {"WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    stage = quick.Stage("train", first, RANK="0", **named)
    other = quick.Stage("tools.join", joiner, RANK="1", **named)
    assert stage.wait() == 0, stage.said + other.said
    assert other.wait() == 0, other.said
    assert "train: resuming from checkpoint-" in stage.said
    assert "rounding" not in stage.said
    assert results(first) == results(undisturbed)


def commit_more(folder: Path) -> None:
    must(folder, "git", "commit", "-q", "--allow-empty", "-m", "another")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (commit_more, "the first machine differs in commit (here "),
        (
            lambda folder: set_params(folder, lora={"r": 4}),
            "the first machine differs in params.yaml (seed, lora, train) (here ",
        ),
        (
            lambda folder: append(folder / "stages/train.py", "# another\n"),
            "the first machine differs in the code of train (here ",
        ),
    ],
    ids=["commit", "params", "code"],
)
def test_a_machine_that_would_train_something_else_is_refused(
    first, joiner, tmp_path, change, what
):
    other = tmp_path / "other"
    must(tmp_path, "git", "clone", "-q", str(first), str(other))
    change(other)
    port = free_port()
    stage = quick.Stage("train", first, MACHINES="2", **environment(port))
    refused = join(other, port)
    assert refused.wait() == 1
    last = refused.said.splitlines()[-1]
    assert last.startswith(f"join: {what}")
    # The first continues to wait for a matching machine.
    assert "ranks" not in stage.said
    stage.kill(signal.SIGKILL)
    stage.wait()


@pytest.mark.parametrize("whole", [False, True], ids=["a rank of it", "all of it"])
def test_the_loss_of_the_other_machine_ends_all(first, joiner, whole):
    set_params(first, train={"epochs": 100.0})
    set_params(joiner, train={"epochs": 100.0})
    try:
        stage, other = start(first, joiner, CHECKPOINT_SECONDS="0")
        assert stage.until(lambda: bool(checkpoints(first))), stage.said + other.said
        ranks = children(stage.process.pid) + children(other.process.pid)
        assert len(ranks) == 2
        since = time.monotonic()
        if whole:
            other.kill(signal.SIGKILL)
        else:
            os.kill(ranks[1], signal.SIGKILL)
        assert stage.wait() == 1
        assert other.wait() == (-signal.SIGKILL if whole else 1)
        assert time.monotonic() - since < SECONDS
        assert end_in_time(ranks)
        last = stage.said.splitlines()[-1]
        if whole:
            assert last.startswith("train: rank 1 has not answered the others")
        else:
            assert last.startswith("train: rank 1: rank 1 was ended by SIGKILL")
            assert other.said.splitlines()[-1].startswith("join: rank 1 was ended by SIGKILL")
    finally:
        for folder in (first, joiner):
            set_params(folder, train={"epochs": 1.0})


def test_a_second_machine_that_a_step_does_not_feed_is_sent_home(first, joiner):
    for folder in (first, joiner):
        set_params(folder, train={"batch_size": 1, "epochs": 0.1})
    try:
        stage, other = start(first, joiner)
        assert stage.wait() == 0, stage.said
        assert "train: uses 1 of 2 ranks" in stage.said
        assert other.wait() == 0, other.said
        assert "this machine is not used" in other.said.splitlines()[-1]
    finally:
        for folder in (first, joiner):
            set_params(folder, train={"batch_size": 4, "epochs": 1.0})


@pytest.mark.parametrize(
    ("env", "line"),
    [
        ({"MACHINES": "two"}, "MACHINES is .two. but must be a whole number from 1"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK is 1: only the process with RANK 0 runs"),
    ],
)
def test_what_names_no_run_is_refused(monkeypatch, env, line):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StageError, match=line):
        how_many()


SHARE = "if [ $RANK = 0 ]; then exec python -m stages.train; else exec python -m tools.join; fi"


def test_torchrun_starts_it(first, undisturbed):
    """Its own store, its own names, all in one folder."""
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "bash", "-c", SHARE],
        cwd=first,
        env=os.environ | quick.ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "join: the training has ended" in done.stdout
    assert results(first) == results(undisturbed)
    assert json.loads((first / "metrics/train_cost.json").read_text())["ranks"] == 2
