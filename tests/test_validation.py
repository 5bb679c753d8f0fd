"""Validation rows decide which state is kept and when training stops, and nothing else."""

import csv
import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
import quick
import torch
from peft import PeftModel
from prepared import make_prepared_workspace
from test_resume import assert_finishes_alike, checkpoints, kill_after, set_params, untrained
from transformers import AutoTokenizer, TrainerControl, TrainerState

from stages.shared.model import load_base
from stages.shared.outputs import write_sums
from stages.shared.process import StageError
from stages.shared.ranks import ALONE
from stages.shared.rows import SCHEMA, read_rows
from stages.shared.scoring import score
from stages.training.checkpoints import Checkpoints
from stages.training.validation import BEST, Validation, best_step, is_due

# Twelve steps at a rate that overshoots: the validation loss is lowest in the middle of them.
TRAIN = {"batch_size": 4, "learning_rate": 0.01}
ADAPTER = "models/adapter/adapter_model.safetensors"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    """A workspace in which train can start, with rows to choose by whose answers no row trains."""
    folder = make_prepared_workspace(tmp_path_factory.mktemp("validation") / "ws")
    rows = read_rows(folder / "data/prepared/eval.arrow")
    tokenizer = AutoTokenizer.from_pretrained(folder / "data/prepared/tokenizer")
    for row in rows:
        start, length = row["prompt_tokens"], len(row["input_ids"])
        answer = tokenizer("QXZ~#@&%" * length)["input_ids"][: length - start]
        row["input_ids"][start:], row["labels"][start:] = answer, answer
    with pa.OSFile(str(folder / "data/prepared/validation.arrow"), "wb") as file:
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        with pa.ipc.new_stream(file, SCHEMA) as writer:
            writer.write_table(table)
    write_sums(folder / "data/prepared")
    set_params(folder, prepare={"validation_rows": len(rows)}, train=TRAIN | {"keep": "best"})
    quick.run("quantize", folder)
    return folder


@pytest.fixture(scope="module")
def chosen(quantized, tmp_path_factory) -> Path:
    """Trained without interruption."""
    folder = tmp_path_factory.mktemp("chosen") / "ws"
    shutil.copytree(quantized, folder)
    quick.run("train", folder)
    return folder


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics/train.json").read_text())


def curve_of(folder: Path) -> list[dict]:
    return list(csv.DictReader((folder / "metrics/curve.csv").read_text().splitlines()))


def test_the_state_of_the_lowest_validation_loss_is_kept_and_named(chosen):
    metrics, curve = metrics_of(chosen), curve_of(chosen)
    losses = {int(r["step"]): float(r["validation_loss"]) for r in curve if r["validation_loss"]}
    assert len(losses) == 10
    assert max(losses) == metrics["steps"] == 12
    kept = metrics["kept_step"]
    # Otherwise these tests could not tell the best state from the last.
    assert 2 < kept < 10
    assert losses[kept] == min(losses.values())
    assert metrics["kept_because"] == "lowest of 10 validation losses"
    assert metrics["best_validation_loss"] == pytest.approx(losses[kept], rel=1e-5)
    assert metrics["last_validation_loss"] == pytest.approx(losses[12], rel=1e-5)
    assert {int(r["step"]): r["kept"] for r in curve if r["kept"]} == {kept: f"{losses[kept]:.6g}"}
    base = load_base(chosen / "models/quantized", torch.device("cpu"))
    model = PeftModel.from_pretrained(base, chosen / "models/adapter")
    scores = score(model, read_rows(chosen / "data/prepared/validation.arrow"))
    assert sum(scores.nll) / sum(scores.tokens) == pytest.approx(losses[kept], rel=1e-5)


@pytest.mark.parametrize("steps", [(3, 5), (11,)], ids=["before and at it", "long after it"])
def test_killed_and_resumed_the_same_state_is_kept(chosen, tmp_path, steps):
    folder = untrained(chosen, tmp_path / "ws")
    for step in steps:
        assert kill_after(folder, step).wait() == -signal.SIGKILL
    newest = checkpoints(folder)[-1]
    assert (newest / BEST).exists()
    resumed = assert_finishes_alike(folder, chosen)
    assert f"resuming from {newest.name}" in resumed.said


def test_patience_stops_with_the_same_state(chosen, tmp_path):
    best = metrics_of(chosen)["kept_step"]
    folder = untrained(chosen, tmp_path / "ws")
    set_params(folder, train={"patience": 3})
    # Also when it was killed meanwhile.
    assert kill_after(folder, best).wait() == -signal.SIGKILL
    quick.run("train", folder)
    assert (folder / ADAPTER).read_bytes() == (chosen / ADAPTER).read_bytes()
    metrics = metrics_of(folder)
    assert best < metrics["steps"] < 12
    assert metrics["kept_step"] == best
    assert metrics["kept_because"].endswith("; stopped early, after 3 without a lower one")
    scored = [row["step"] for row in curve_of(folder) if row["validation_loss"]]
    assert [int(step) > best for step in scored].count(True) == 3


def test_validation_rows_change_no_step(chosen, tmp_path):
    """The last state equals that of a run without validation."""
    folder = untrained(chosen, tmp_path / "ws")
    (folder / "data/prepared/validation.arrow").unlink()
    write_sums(folder / "data/prepared")
    set_params(folder, prepare={"validation_rows": 0}, train={"keep": "last"})
    quick.run("train", folder)
    assert not any("validation" in key or "kept" in key for key in metrics_of(folder))
    plain, scored = curve_of(folder), curve_of(chosen)
    assert [{key: row[key] for key in plain[0]} for row in scored] == plain
    set_params(chosen_last := untrained(chosen, tmp_path / "last"), train={"keep": "last"})
    quick.run("train", chosen_last)
    assert (folder / ADAPTER).read_bytes() == (chosen_last / ADAPTER).read_bytes()
    kept = metrics_of(chosen_last)
    assert (kept["kept_step"], kept["kept_because"]) == (12, "last state")


def test_two_ranks_keep_what_one_keeps_also_when_killed(chosen, tmp_path):
    together = untrained(chosen, tmp_path / "together")
    quick.run("train", together, CPU_RANKS="2")
    one, two = metrics_of(chosen), metrics_of(together)
    assert two["kept_step"] == one["kept_step"]
    assert two["best_validation_loss"] == pytest.approx(one["best_validation_loss"], rel=1e-3)
    folder = untrained(chosen, tmp_path / "killed")
    stage = quick.Stage("train", folder, CPU_RANKS="2", CHECKPOINT_SECONDS="0")
    assert stage.until(lambda: quick.sealed(folder, 9))
    stage.kill(signal.SIGKILL)
    stage.wait()
    assert (checkpoints(folder)[-1] / BEST).exists()
    quick.run("train", folder, CPU_RANKS="2")
    for name in (ADAPTER, "metrics/train.json", "metrics/curve.csv"):
        assert (folder / name).read_bytes() == (together / name).read_bytes(), name


@pytest.mark.parametrize(("steps", "due"), [(20, range(2, 21, 2)), (4, range(1, 5))])
def test_rows_are_scored_ten_times_and_at_the_end(steps, due):
    assert [step for step in range(1, steps + 1) if is_due(step, steps)] == list(due)


def test_the_first_of_equal_losses_is_the_best():
    assert best_step({2: 1.5, 4: 1.0, 6: 1.0}) == 4


def test_an_early_end_is_the_last_step_for_checkpoints(tmp_path):
    """A checkpoint saved there would train on."""
    checkpoints, control = Checkpoints(tmp_path), TrainerControl(should_training_stop=True)
    checkpoints.saved_at = -1e9
    checkpoints.on_step_end(None, TrainerState(global_step=2, max_steps=9), control)
    assert checkpoints.trained
    assert not control.should_save


def validation(train: dict, rows: list) -> Validation:
    settings = SimpleNamespace(**{"keep": "last", "patience": None} | train)
    scores = SimpleNamespace(nll=[float("nan")], tokens=[1])
    trainer = SimpleNamespace(world=ALONE, score=lambda *_: scores)
    return Validation(trainer, rows, settings, 100)


@pytest.mark.parametrize("train", [{"keep": "best"}, {"patience": 2}])
def test_nothing_is_chosen_by_no_rows(train):
    with pytest.raises(StageError, match="no validation rows; dvc repro prepare makes them"):
        validation(train, [])


def test_a_validation_loss_that_is_no_number_ends_training():
    state, model = TrainerState(global_step=1, max_steps=1), torch.nn.Linear(1, 1)
    model.device = torch.device("cpu")
    with pytest.raises(StageError, match="validation loss is nan at step 1; lower"):
        validation({}, [{}]).on_step_end(None, state, TrainerControl(), model=model)
