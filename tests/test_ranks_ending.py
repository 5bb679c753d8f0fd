"""Ranks that fail, die, hang or are stopped: all end, with one line, and a run can resume."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import quick
from prepared import make_prepared_workspace
from test_resume import break_base, checkpoints, results, set_params, untrained
from tiny import append

pytestmark = pytest.mark.slow

# Longer than any test waits, and shorter than the 300 s of a real run.
LONG = {"batch_size": 2, "epochs": 100.0}
SECONDS = 15.0
TIMEOUT = 4.0


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    folder = make_prepared_workspace(tmp_path_factory.mktemp("ending") / "ws")
    quick.run("quantize", folder)
    set_params(folder, train={"batch_size": 4})
    return folder


@pytest.fixture
def folder(quantized, tmp_path) -> Path:
    return untrained(quantized, tmp_path / "ws")


@pytest.fixture(scope="module")
def undisturbed(quantized, tmp_path_factory) -> Path:
    folder = untrained(quantized, tmp_path_factory.mktemp("undisturbed") / "ws")
    quick.run("train", folder, CPU_RANKS="2")
    return folder


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def end_in_time(ranks: list[int]) -> bool:
    """Whether all ranks without a parent have ended within SECONDS."""
    deadline = time.monotonic() + SECONDS
    while any(map(is_alive, ranks)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(is_alive, ranks))


def start(folder: Path, **env: str) -> tuple[quick.Stage, list[int]]:
    """Training on two ranks that has made a step, and the ranks' process numbers."""
    before = set(checkpoints(folder))
    stage = quick.Stage("train", folder, CPU_RANKS="2", CHECKPOINT_SECONDS="0", **env)
    assert stage.until(lambda: bool(set(checkpoints(folder)) - before)), stage.said
    ranks = children(stage.process.pid)
    assert len(ranks) == 2
    return stage, ranks


def assert_ended(stage: quick.Stage, ranks: list[int], since: float, seconds: float) -> str:
    """Wait until all have ended, with one line, which is returned."""
    assert stage.wait() == 1
    assert time.monotonic() - since < seconds
    assert not any(map(is_alive, ranks))
    assert not (stage.folder / "models/adapter").exists()
    last = stage.said.splitlines()[-1]
    assert last.startswith("train: ")
    assert "Traceback" not in stage.said
    return last


def test_a_rank_that_dies_ends_all(folder):
    set_params(folder, train=LONG)
    stage, ranks = start(folder)
    since = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    assert assert_ended(stage, ranks, since, SECONDS) == (
        "train: rank 1 was ended by SIGKILL (by the system when memory runs out: see dmesg); "
        "run it again"
    )


def test_a_rank_that_hangs_ends_all(folder):
    set_params(folder, train=LONG)
    stage, ranks = start(folder, RANKS_TIMEOUT=str(TIMEOUT))
    since = time.monotonic()
    os.kill(ranks[1], signal.SIGSTOP)
    assert assert_ended(stage, ranks, since, TIMEOUT + SECONDS) == (
        "train: rank 1 has not answered the others for 4 s; check that GPU and its process, "
        "then run it again"
    )


def test_ranks_do_not_outlive_the_stage(folder):
    set_params(folder, train=LONG)
    stage, ranks = start(folder)
    stage.kill(signal.SIGKILL)
    stage.wait()
    assert end_in_time(ranks)


FAILS = """

_step = Trainer.training_step


def _fail(self, *args, **kwargs):
    if self.world.rank == 1 and self.state.global_step == 2:
        raise {fault}
    return _step(self, *args, **kwargs)


Trainer.training_step = _fail
"""


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("ValueError('what nobody expected')", "train: rank 1: ValueError: what nobody expected"),
        (
            "torch.cuda.OutOfMemoryError('CUDA out of memory.')",
            "train: rank 1: out of GPU memory with 0.00 GB allocated (adapter 0.00, ",
        ),
        (
            "torch.distributed.DistBackendError('NCCL error: Cuda failure 2 out of memory')",
            "train: rank 1: out of GPU memory with 0.00 GB allocated (adapter 0.00, ",
        ),
    ],
    ids=["exception", "out of memory", "out of memory in NCCL"],
)
def test_a_rank_that_fails_ends_all(folder, fault, line):
    set_params(folder, train={"batch_size": 4})
    append(folder / "stages/training/trainer.py", FAILS.format(fault=fault))
    since = time.monotonic()
    stage = quick.Stage("train", folder, CPU_RANKS="2")
    assert stage.wait() == 1
    # Including the start.
    assert time.monotonic() - since < 60 + SECONDS
    assert stage.said.splitlines()[-1].startswith(line)
    # A bug is shown with its traceback, a fault of the machine is not.
    assert ("Traceback" in stage.said) == ("ValueError" in fault)
    assert not (folder / "models/adapter").exists()


def test_a_fault_of_the_training_names_the_rows_of_all_ranks(folder):
    break_base(folder, float("nan"))
    set_params(folder, train={"batch_size": 4})
    stage = quick.Stage("train", folder, CPU_RANKS="2")
    assert stage.wait() == 1
    last = stage.said.splitlines()[-1]
    assert last.startswith("train: the loss is nan at step 1 (rows rows.jsonl:")
    assert last.count("rows.jsonl:") == 4


def test_a_signal_is_one_agreed_checkpoint_and_the_run_goes_on(folder, undisturbed):
    stage, ranks = start(folder)
    # Signals from dvc and from the system: two.
    stage.kill(signal.SIGTERM)
    stage.kill(signal.SIGTERM)
    last = assert_ended(stage, ranks, time.monotonic(), SECONDS)
    assert last == "train: stopped by SIGTERM; dvc repro resumes from the saved checkpoint"
    made = checkpoints(folder)[-1]
    assert {path.name for path in made.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    again = quick.run("train", folder, CPU_RANKS="2")
    assert f"train: resuming from {made.name}\n" in again.said
    assert results(folder) == results(undisturbed)


def test_a_signal_before_training_ends_the_ranks_too(folder):
    stage = quick.Stage("train", folder, CPU_RANKS="2")
    assert stage.until(lambda: len(children(stage.process.pid)) == 2)
    ranks = children(stage.process.pid)
    stage.kill(signal.SIGTERM)
    assert stage.wait() in (1, -signal.SIGTERM)
    # A rank that is not listening yet checks for the stage when it starts to.
    assert end_in_time(ranks)
    assert not (folder / "models/adapter").exists()


def test_killed_again_and_again_ends_like_an_undisturbed_one(folder, undisturbed):
    for victim in (0, 1):
        stage, ranks = start(folder)
        os.kill(ranks[victim], signal.SIGKILL)
        assert stage.wait() == 1
    stage, _ = start(folder)
    stage.kill(signal.SIGKILL)
    stage.wait()
    again = quick.run("train", folder, CPU_RANKS="2")
    assert "train: resuming from checkpoint-" in again.said
    assert "rounding" not in again.said
    assert results(folder) == results(undisturbed)


def test_another_number_of_ranks_goes_on_and_says_so(folder, undisturbed):
    stage, _ = start(folder)
    stage.kill(signal.SIGTERM)
    assert stage.wait() == 1
    name = checkpoints(folder)[-1].name
    again = quick.run("train", folder)
    other = "written by 2 ranks, not 1: rounding may differ"
    assert f"train: resuming from {name}, {other}\n" in again.said
    one, two = (json.loads((f / "metrics/train.json").read_text()) for f in (folder, undisturbed))
    assert one == pytest.approx(two, rel=1e-5)
