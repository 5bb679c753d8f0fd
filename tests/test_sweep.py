"""Many runs, as in docs/scale.md: on several machines with one remote, and one per GPU."""

from pathlib import Path

import pytest
import stubs
from stubs import must, run
from tiny import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    """The file in which every stub that runs writes its name."""
    return tmp_path_factory.mktemp("sweep") / "log"


@pytest.fixture(scope="module")
def first(log, tmp_path_factory) -> Path:
    """A repository with a DVC remote and a Git one, in which nothing was run."""
    folder = stubs.make(tmp_path_factory.mktemp("repositories") / "first")
    must(folder, "dvc", "remote", "add", "-q", "-d", "disk", str(folder.parent / "remote"))
    stubs.commit(folder, "remote")
    origin = folder.parent / "origin.git"
    must(folder, "git", "clone", "-q", "--bare", ".", str(origin))
    must(folder, "git", "remote", "add", "origin", str(origin))
    return folder


def ran(log: Path) -> list[str]:
    names = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return names


def commands(heading: str) -> list[str]:
    """The commands below a heading of docs/scale.md."""
    section = (ROOT / "docs/scale.md").read_text(encoding="utf-8").split(heading, 1)[1]
    block = section.split("```console\n", 1)[1].split("```", 1)[0]
    return [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]


def test_what_one_machine_computed_the_other_does_not(first, log):
    on_one, on_other = commands("### Over machines"), commands("On any other machine")
    for command in on_one:
        must(first, "bash", "-ec", command, STUB_LOG=str(log))
    assert "train" in ran(log)
    second = first.parent / "second"
    must(first.parent, "git", "clone", "-q", str(first.parent / "origin.git"), str(second))
    for command in on_other:
        must(second, "bash", "-ec", command, STUB_LOG=str(log))
    # What does not depend on the rate, and this machine's own rate.
    assert ran(log) == ["plan", "train", "evaluate", "merge", "verify", "export"]
    assert "rate-1e-4" in must(second, "dvc", "exp", "list", "--name-only")


def test_one_run_a_gpu_side_by_side(first, log):
    """The stub of a GPU: what the stages find in CUDA_VISIBLE_DEVICES."""
    train = first / "stages/train.py"
    seen = "\nPath(os.environ['STUB_LOG'] + '.gpus').open('a').write(os.environ['{}'] + ' ')\n"
    train.write_text(train.read_text() + seen.format("CUDA_VISIBLE_DEVICES"))
    stubs.commit(first, "a stub that says its GPU")
    (command,) = commands("### One per GPU")
    done = run(first, "bash", "-ec", command, STUB_LOG=str(log))
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted((log.parent / "log.gpus").read_text().split()) == ["0", "1"]
    assert ran(log).count("train") == 2
    names = must(first, "dvc", "exp", "list", "--name-only").split()
    assert {"gpu0", "gpu1"} <= set(names)


def test_many_experiments_and_one_merged_model(log, tmp_path):
    folder = stubs.make(tmp_path / "project")
    must(folder, "dvc", "repro", "-q", STUB_LOG=str(log))
    stubs.commit(folder, "a run")
    ran(log)
    *queued, run_all, take = commands("### Many, and one")
    for command in (*queued, run_all):
        must(folder, "bash", "-ec", command, STUB_LOG=str(log))
    assert sorted(ran(log)) == sorted(["plan", "train", "evaluate"] * len(queued))
    # No merged model but the workspace's was made: there is nothing to free.
    assert "0.00 GB: 0 files" in must(folder, "python", "-m", "tools.free")
    must(folder, "bash", "-ec", take, STUB_LOG=str(log))
    assert ran(log) == ["merge", "verify", "export"]
    # The merged model of the run before, as each of them would have kept one.
    assert ": 0 files" not in must(folder, "python", "-m", "tools.free")
