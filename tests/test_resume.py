"""A training run that is killed, stopped or damaged ends with the bytes of an undisturbed one."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import quick
import torch
from datasets import Dataset
from prepared import make_mixture_workspace, make_prepared_workspace
from ruamel.yaml import YAML
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import append
from transformers import TrainerControl, TrainerState, TrainingArguments

from stages.shared.interrupts import NOTE, interrupted_before
from stages.shared.outputs import write_sums
from stages.shared.process import StageError
from stages.training.checkpoints import (
    SIGNALS,
    Checkpoints,
    _bytes_of,
    fingerprint,
    newest_complete,
)
from stages.training.faults import EXPLODED_STEPS, MOVED_BY_STEP, Faults, row_names

pytestmark = pytest.mark.slow

# Metrics of time and memory, which no two runs share.
TIMINGS = {"metrics/quantize_cost.json", "metrics/train_cost.json"}
# Twelve steps or more each. Together: every schedule but the constant one, every batching,
# a last accumulation that is not full, dropout, part of an epoch.
VARIANTS = {
    "linear": {"batch_size": 4},
    "grouped": {"batch_size": 8, "epochs": 2.0},
    "packing": {"batch_size": 1, "batching": "packing", "schedule": "cosine", "epochs": 2.0},
    "accumulation": {
        "batch_size": 1,
        "gradient_accumulation": 5,
        "batching": "shuffle",
        "schedule": "constant_with_warmup",
        "epochs": 1.5,
        "gradient_checkpointing": True,
    },
    "experts": {"batch_size": 4},
}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    """A workspace in which train can start."""
    folder = make_prepared_workspace(tmp_path_factory.mktemp("resume") / "ws")
    quick.run("quantize", folder)
    return folder


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    """The same of a mixture, whose experts are trained too."""
    folder = make_mixture_workspace(tmp_path_factory.mktemp("mixture") / "ws")
    quick.run("quantize", folder)
    return folder


@pytest.fixture(scope="module", params=VARIANTS)
def undisturbed(request, tmp_path_factory) -> Path:
    """A workspace of one variant, trained without a disturbance."""
    if request.param == "linear":
        return request.getfixturevalue("undamaged")
    source = request.getfixturevalue("mixture" if request.param == "experts" else "quantized")
    folder = untrained(source, tmp_path_factory.mktemp(request.param) / "ws")
    set_params(folder, train=VARIANTS[request.param])
    if request.param == "accumulation":
        set_params(folder, lora={"dropout": 0.1})
    quick.run("train", folder)
    if request.param == "experts":
        adapter = load_file(folder / "models/adapter/adapter_model.safetensors")
        assert sum("experts" in name and tensor.any() for name, tensor in adapter.items()) == 8
    return folder


@pytest.fixture(scope="module")
def undamaged(quantized, tmp_path_factory) -> Path:
    """The linear one, as a person runs it, in a process of its own; the others are quicker."""
    folder = untrained(quantized, tmp_path_factory.mktemp("linear") / "ws")
    set_params(folder, train=VARIANTS["linear"])
    command = [sys.executable, "-m", "stages.train"]
    subprocess.run(command, cwd=folder, env=os.environ | quick.ENVIRONMENT, check=True)
    return folder


@pytest.fixture(scope="module")
def changed(quantized, tmp_path_factory) -> list[str]:
    """The changes of files during that training (`kill_at` of tests/quick.py)."""
    folder = untrained(quantized, tmp_path_factory.mktemp("changed") / "ws")
    set_params(folder, train=VARIANTS["linear"])
    return quick.changes("train", folder)


@pytest.fixture
def fresh(undisturbed, tmp_path) -> Path:
    """The same workspace, not trained yet."""
    return untrained(undisturbed, tmp_path / "ws")


@pytest.fixture
def simple(quantized, tmp_path) -> Path:
    """One workspace for tests that do not depend on the variant."""
    folder = untrained(quantized, tmp_path / "ws")
    set_params(folder, train=VARIANTS["linear"])
    return folder


def untrained(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("adapter", "*.log", "metrics"))
    (folder / "metrics").mkdir()
    return folder


def set_params(folder: Path, **sections: dict) -> None:
    yaml, path = YAML(), folder / "params.yaml"
    params = yaml.load(path)
    for section, values in sections.items():
        params[section].update(values)
    yaml.dump(params, path)


def results(folder: Path) -> dict[str, bytes]:
    """Every output of train but timings, by name."""
    files = [*(folder / "models/adapter").rglob("*"), *(folder / "metrics").iterdir()]
    named = {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}
    return {name: content for name, content in named.items() if name not in TIMINGS}


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(quick.sealed(folder), key=lambda p: int(p.name.split("-")[1]))


def kill_after(folder: Path, step: int, number: int = signal.SIGKILL) -> quick.Stage:
    """Train with a checkpoint at every step, and send a signal when that of `step` is complete."""
    stage = quick.Stage("train", folder, CHECKPOINT_SECONDS="0")
    assert stage.until(lambda: quick.sealed(folder, step)), stage.said
    stage.kill(number)
    return stage


def assert_finishes_alike(folder: Path, undisturbed: Path) -> quick.Stage:
    stage = quick.run("train", folder)
    assert results(folder) == results(undisturbed)
    assert not list((folder / "checkpoints").iterdir())
    assert not list((folder / "models").glob(".*"))
    return stage


def test_killed_again_and_again_ends_like_an_undisturbed_one(fresh, undisturbed):
    for step in (1, 8):
        assert kill_after(fresh, step).wait() == -signal.SIGKILL
        assert not (fresh / "models/adapter").exists()
    resumed = assert_finishes_alike(fresh, undisturbed)
    assert "train: resuming from checkpoint-" in resumed.said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_saves_and_stops(quantized, tmp_path, number):
    folder = untrained(quantized, tmp_path / "ws")
    # So many steps that the signals come during training however busy the machine is.
    set_params(folder, train={"batch_size": 1, "epochs": 100.0})
    stage = quick.Stage("train", folder)
    # The handler is there when training begins; until then there is nothing to save.
    assert stage.until(lambda: stage.catches(signal.SIGTERM)), stage.said
    # It usually comes twice: from the terminal or the system, and through dvc.
    stage.kill(number)
    stage.kill(number)
    assert stage.wait() == 1
    assert stage.said.splitlines()[-1] == (
        f"train: stopped by {number.name}; dvc repro resumes from the saved checkpoint"
    )
    assert not (folder / "models/adapter").exists()
    assert len(checkpoints(folder)) == 1
    name = checkpoints(folder)[0].name
    again = quick.Stage("train", folder)
    assert again.until(lambda: f"train: resuming from {name}\n" in again.said), again.said
    again.kill(signal.SIGKILL)
    again.wait()


def test_signal_before_training_ends_the_stage(simple):
    stage = quick.Stage("train", simple)
    stage.kill(signal.SIGTERM)
    assert stage.wait() == -signal.SIGTERM
    assert not (simple / "models/adapter").exists()


def test_ignored_signal_stays_ignored(tmp_path):
    """nohup asks for it."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        Checkpoints(tmp_path).on_train_begin(None, None, None)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_signal_in_the_last_step_stops_what_follows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state, control = TrainerState(global_step=3, max_steps=3), TrainerControl()
    early, late = Checkpoints(tmp_path), Checkpoints(tmp_path)
    early._stop(signal.SIGTERM, None)
    assert not interrupted_before()
    early.on_step_end(None, state, control)
    early.raise_if_stopped()
    assert interrupted_before()
    NOTE.unlink()
    late.on_step_end(None, state, control)
    assert not interrupted_before()
    late._stop(signal.SIGTERM, None)
    late.raise_if_stopped()
    assert interrupted_before()


def test_second_press_of_ctrl_c_ends_training_at_once(tmp_path, monkeypatch, capfd):
    killed, clock = [], [100.0]
    monkeypatch.setattr("stages.training.checkpoints.kill_oneself", killed.append)
    monkeypatch.setattr("stages.training.checkpoints.time.monotonic", lambda: clock[0])
    checkpoints = Checkpoints(tmp_path)
    for after in (0, 0.01, 0.5):
        clock[0] = 100 + after
        checkpoints._stop(signal.SIGINT, None)
    assert killed == []
    assert capfd.readouterr().err == (
        "train: stops when this step is complete; Ctrl-C again ends it now\n"
    )
    clock[0] = 102
    checkpoints._stop(signal.SIGINT, None)
    assert killed == [signal.SIGINT]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.fixture(scope="module")
def killed(quantized, tmp_path_factory) -> Path:
    """A workspace whose training was killed, with two checkpoints."""
    folder = untrained(quantized, tmp_path_factory.mktemp("killed") / "ws")
    set_params(folder, train=VARIANTS["linear"])
    assert kill_after(folder, 5).wait() == -signal.SIGKILL
    return folder


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / "optimizer.pt"),
        lambda folder: os.truncate(folder / "adapter_model.safetensors", 100),
        lambda folder: (folder / "trainer_state.json").unlink(),
        lambda folder: (folder / "SHA256SUMS").unlink(),
        lambda folder: flip(folder / "SHA256SUMS"),
        lambda folder: os.truncate(folder / "SHA256SUMS", 180),
        lambda folder: (folder / "SHA256SUMS").write_bytes(b""),
    ],
    ids=["flipped", "truncated", "missing", "unsealed", "seal flipped", "seal cut", "seal empty"],
)
def test_damaged_checkpoint_is_skipped_with_a_word(killed, tmp_path, capsys, damage):
    shutil.copytree(checkpoints(killed)[0].parent, tmp_path / "key")
    older, newest = both(tmp_path / "key")
    damage(newest)
    assert newest_complete(tmp_path / "key") == older
    skipped = f"train: {newest.name} is incomplete or damaged, skipped\n"
    assert capsys.readouterr().out == f"{skipped}train: resuming from {older.name}\n"


def both(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[-2:]


def test_training_goes_on_before_a_damaged_checkpoint(killed, undamaged, tmp_path):
    folder = tmp_path / "ws"
    shutil.copytree(killed, folder)
    older, newest = checkpoints(folder)[-2:]
    flip(newest / "optimizer.pt")
    resumed = assert_finishes_alike(folder, undamaged)
    assert f"train: {newest.name} is incomplete or damaged, skipped" in resumed.said
    assert f"train: resuming from {older.name}" in resumed.said


def test_training_begins_anew_when_all_are_damaged(simple, undamaged):
    assert kill_after(simple, 3).wait() == -signal.SIGKILL
    for folder in checkpoints(simple):
        flip(folder / "scheduler.pt")
    assert "resuming from" not in assert_finishes_alike(simple, undamaged).said


def test_checkpoint_of_other_parameters_is_never_used(simple, undamaged):
    assert kill_after(simple, 4).wait() == -signal.SIGKILL
    set_params(simple, lora={"r": 4})
    other = quick.run("train", simple)
    assert "resuming from" not in other.said
    assert "train: 1 unfinished runs with other parameters take 0.00 GB in " in other.said
    config = json.loads((simple / "models/adapter/adapter_config.json").read_text())
    assert config["r"] == 4
    set_params(simple, lora={"r": 16})
    assert "resuming from" in assert_finishes_alike(simple, undamaged).said


def test_checkpoint_of_kernels_that_round_otherwise_is_never_used(monkeypatch):
    keys = set()
    for installed in ({}, {"flash-attn-4": "1"}, {"flash-attn-4": "2"}, {"liger-kernel": "1"}):
        monkeypatch.setattr("stages.training.checkpoints.version_of", installed.get)
        keys.add(fingerprint({}, [], [], "GPU"))
    assert len(keys) == 4


def test_checkpoint_of_other_code_or_data_is_never_used(simple):
    assert kill_after(simple, 4).wait() == -signal.SIGKILL
    append(simple / "stages/shared/scoring.py", "# another\n")
    stage = quick.Stage("train", simple, CHECKPOINT_SECONDS="0")
    assert stage.until(lambda: len(list((simple / "checkpoints").iterdir())) == 2)
    stage.kill(signal.SIGKILL)
    stage.wait()
    assert "resuming from" not in stage.said
    prepared = simple / "data/prepared"
    append(prepared / "prepared.json", "\n")
    write_sums(prepared)
    assert "resuming from" not in quick.run("train", simple).said


def test_kill_between_the_adapter_and_its_metrics(simple, undamaged, changed):
    renamed = [i for i, line in enumerate(changed, 1) if line.startswith("os.rename models/.adap")]
    stage = quick.Stage("train", simple, kill_at=renamed[-1] + 2)
    assert stage.wait() == -signal.SIGKILL
    assert (simple / "models/adapter/SHA256SUMS").exists()
    assert not (simple / "metrics/train.json").exists()
    assert_finishes_alike(simple, undamaged)


def stopped_with_the_lock(folder: Path, changed: list[str]) -> quick.Stage:
    """A training that holds its checkpoints' lock and stands still."""
    taken = next(i for i, line in enumerate(changed, 1) if line.endswith("/lock"))
    stage = quick.Stage("train", folder, kill_at=taken + 1, number=signal.SIGSTOP)
    assert stage.until(stage.stopped), stage.said
    return stage


def waits_for(first: quick.Stage, second: quick.Stage) -> bool:
    line = f"train: waiting for process {first.process.pid}, which runs the same stage"
    return second.log.exists() and line in second.said


def test_second_run_waits_and_says_for_whom(simple, undamaged, changed):
    first = stopped_with_the_lock(simple, changed)
    first.log = first.log.rename(simple / "first.log")
    second = quick.Stage("train", simple)
    assert second.until(lambda: waits_for(first, second))
    first.kill(signal.SIGCONT)
    assert first.wait() == 0
    assert second.wait() == 0
    assert results(simple) == results(undamaged)


def test_same_training_in_another_copy_waits_too(simple, changed, tmp_path):
    """Experiments run in temporary copies, with their checkpoints in the project."""
    copy = untrained(simple, tmp_path / "copy")
    first = stopped_with_the_lock(simple, changed)
    second = quick.Stage("train", copy, DVC_ROOT=str(simple))
    assert second.until(lambda: waits_for(first, second))
    first.kill(signal.SIGCONT)
    assert first.wait() == 0
    assert second.wait() == 0
    assert results(simple) == results(copy)


def test_copy_goes_on_from_the_checkpoints_of_the_project(simple, undamaged, tmp_path):
    copy = untrained(simple, tmp_path / "copy")
    assert kill_after(simple, 4).wait() == -signal.SIGKILL
    again = quick.run("train", copy, DVC_ROOT=str(simple))
    assert "resuming from" in again.said
    assert results(copy) == results(undamaged)


def test_few_checkpoints_are_kept(simple):
    assert kill_after(simple, 6, signal.SIGTERM).wait() == 1
    assert len(checkpoints(simple)) == 2


def break_base(folder: Path, value: float) -> None:
    """Set a value in the base's final norm that no model has."""
    file = folder / "models/quantized/model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][:] = value
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, file, metadata)
    write_sums(folder / "models/quantized")


@pytest.mark.parametrize(
    ("train", "base", "reason", "remedy"),
    [
        ({}, float("nan"), "the loss is nan at step 1 (rows rows.jsonl:", "check these rows"),
        ({}, 1e30, "the gradient's norm is ", "lower train.learning_rate"),
        (
            {"learning_rate": 1e-300},
            None,
            "the adapter does not change at step 5 (rows rows.jsonl:",
            "raise train.learning_rate or change lora.target_modules",
        ),
    ],
    ids=["loss", "gradient", "motion"],
)
def test_training_that_goes_wrong_stops(simple, train, base, reason, remedy):
    set_params(simple, train=train)
    if base is not None:
        break_base(simple, base)
    stage = quick.Stage("train", simple, CHECKPOINT_SECONDS="0")
    assert stage.wait() == 1
    last = stage.said.splitlines()[-1]
    assert last.startswith(f"train: {reason}")
    assert remedy in last
    assert not (simple / "models/adapter").exists()
    assert not list((simple / "metrics").iterdir())
    # The checkpoints are those of the steps before.
    step = int(last.partition("at step ")[2].split()[0])
    assert [int(folder.name.split("-")[1]) for folder in checkpoints(simple)] == [
        *range(max(1, step - 2), step)
    ]


class Model(torch.nn.Module):
    """Something to call as the trainer calls a model."""

    def forward(self, **inputs):
        return inputs["input_ids"]


PADDED = {
    "input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
}
PACKED = {
    "input_ids": torch.tensor([[8, 9, 5, 6, 7, 1]]),
    "position_ids": torch.tensor([[0, 1, 0, 1, 2, 0]]),
}


@pytest.fixture
def faults():
    rows = {"row": ["a.jsonl:1", "a.jsonl:2"], "input_ids": [[5, 6, 7], [8, 9]]}
    return Faults(Dataset.from_dict(rows))


def train_with(faults: Faults, losses: list[float], batches: list[dict]) -> None:
    """Call Faults as a trainer does, from the second half of a schedule on."""
    arguments = TrainingArguments(gradient_accumulation_steps=len(batches), report_to="none")
    state, model = TrainerState(global_step=MOVED_BY_STEP, max_steps=1000), Model()
    faults.on_train_begin(arguments, state, None, model=model)
    for loss in losses:
        for batch in batches:
            model(**batch)
        state.global_step += 1
        faults.on_log(arguments, state, None, logs={"loss": loss, "grad_norm": 1.0}, model=model)
    faults.on_train_end(arguments, state, None)


@pytest.mark.parametrize(
    ("batches", "names"),
    [
        ([PADDED], "a.jsonl:1, a.jsonl:2"),
        ([PACKED], "a.jsonl:2, a.jsonl:1, ?"),
        ([PADDED, PADDED], "a.jsonl:1, a.jsonl:2, a.jsonl:1, a.jsonl:2"),
    ],
    ids=["padded", "packed", "accumulated"],
)
def test_exploding_loss_names_the_rows_of_its_step(faults, batches, names):
    with pytest.raises(StageError) as stopped:
        train_with(faults, [3.0, 1.0, 0.9, 1.1, 1.0, 9.0, 9.5, 3.2, 8.0, 11.0], batches)
    assert str(stopped.value) == (
        "the loss exploded to 11.00, from a median of 1.00 at step 15 "
        f"(rows {names}); lower train.learning_rate or raise train.warmup_ratio"
    )


class Read:
    """The rows of a data set as `row_names` may have them: a table at a time, none it needs not."""

    def __init__(self, tables: list[dict]):
        self.tables, self.read = tables, 0

    def with_format(self, kind: str) -> "Read":
        assert kind == "arrow"
        return self

    def iter(self, size: int):
        for table in self.tables:
            self.read += 1
            yield pa.table(table)


@pytest.mark.parametrize(
    ("ids", "name", "read"),
    [
        ([8, 9], "a.jsonl:2", 1),
        ([3, 1], "a.jsonl:4", 2),
        ([5, 6], "a.jsonl:1", 3),
        ([6, 7], "?", 3),
    ],
    ids=["in the first table", "in the second", "cut", "none"],
)
def test_rows_are_named_table_by_table(ids, name, read):
    rows = Read(
        [
            {"row": ["a.jsonl:1", "a.jsonl:2"], "input_ids": [[5, 6, 7], [8, 9]]},
            {"row": ["a.jsonl:3", "a.jsonl:4"], "input_ids": [[3, 1, 2], [3, 1]]},
            {"row": ["a.jsonl:5", "a.jsonl:6"], "input_ids": [[], [5, 6, 8]]},
        ]
    )
    batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
    assert (row_names([batch], rows), rows.read) == ([name], read)


@pytest.mark.parametrize(
    "losses",
    [
        [1.0] * 9 + [50.0] * (EXPLODED_STEPS - 1) + [1.0] * 9,
        [1.0] * 9 + [2.9] * 20,
        [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0],
        [50.0] * 3,
    ],
    ids=["hard rows", "a little worse", "falling", "high from the start"],
)
def test_loss_that_does_not_explode_goes_on(faults, losses):
    train_with(faults, losses, [PADDED])


def test_files_that_another_run_removes_meanwhile_do_not_matter(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).write_text("1234")
    walked = [(str(tmp_path), [], ["a", "b", "gone"])]
    monkeypatch.setattr(os, "walk", lambda folder: walked)
    assert _bytes_of(tmp_path) == 8
