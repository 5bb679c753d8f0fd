"""Trackers show what training does and change nothing of it.

Weights & Biases and MLflow are not installed with the project: make test-trackers has them.
"""

import importlib.util
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import quick
from prepared import make_prepared_workspace
from test_resume import kill_after, results, set_params, untrained
from transformers import TrainerControl, TrainerState

from stages.shared.process import StageError
from stages.shared.ranks import ALONE
from stages.training import tracking
from stages.training.tracking import Tracker, check_installed, trackers

SHOWN = {"train/loss", "train/learning_rate", "train/grad_norm", "eval/loss"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A workspace trained without a tracker, with dropout: whoever draws a number shows in it."""
    folder = make_prepared_workspace(tmp_path_factory.mktemp("trackers") / "ws")
    set_params(folder, train={"batch_size": 4, "batching": "shuffle"}, lora={"dropout": 0.1})
    quick.run("quantize", folder)
    quick.run("train", folder)
    return folder


def tracked(plain: Path, folder: Path, name: str, **env: str) -> quick.Stage:
    """Train in `folder` with a tracker."""
    untrained(plain, folder)
    set_params(folder, tracking={"report_to": name})
    stage = quick.run("train", folder, **env)
    assert results(folder) == results(plain)
    return stage


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows of the only run in runs/: value by step of each tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = (folder / "runs").iterdir()
    shown = EventAccumulator(str(run))
    shown.Reload()
    return {
        tag: {event.step: event.value for event in shown.Scalars(tag)}
        for tag in shown.Tags()["scalars"]
    }


def test_tensorboard_switched_on_in_between_trains_nothing_again(plain, tmp_path):
    """The logs stay where they are said to be, of a killed run in one place."""
    folder = untrained(plain, tmp_path / "ws")
    assert kill_after(folder, 3).wait() == -signal.SIGKILL
    set_params(folder, tracking={"report_to": "tensorboard"})
    assert kill_after(folder, 6).wait() == -signal.SIGKILL
    stage = quick.run("train", folder)
    assert "resuming from checkpoint-" in stage.said
    assert results(folder) == results(plain)
    assert not list((folder / "checkpoints").iterdir())
    found = scalars(folder)
    assert found.keys() >= SHOWN
    lines = (folder / "metrics/curve.csv").read_text().splitlines()
    header, *rows = (line.split(",") for line in lines)
    curve = {int(row[0]): dict(zip(header, row, strict=True)) for row in rows}
    # From where it was switched on, without a gap.
    assert sorted(found["train/loss"]) == list(range(min(found["train/loss"]), 13))
    for step, loss in found["train/loss"].items():
        assert loss == pytest.approx(float(curve[step]["loss"]), rel=1e-4)
    scored = {step: row["eval_loss"] for step, row in curve.items() if row["eval_loss"]}
    assert found["eval/loss"][12] == pytest.approx(float(scored[12]), rel=1e-4)
    assert found["eval/loss"].keys() <= scored.keys()


def test_wandb_offline(plain, tmp_path):
    pytest.importorskip("wandb")
    tracked(plain, tmp_path / "ws", "wandb", WANDB_MODE="offline")
    (run,) = (tmp_path / "ws/runs/wandb").glob("offline-run-*")
    logged = next(run.glob("*.wandb")).read_bytes()
    assert all(name.encode() in logged for name in SHOWN)
    assert not (tmp_path / "ws/wandb").exists()


@pytest.mark.parametrize("store", ["sqlite", "of the environment"])
def test_mlflow(plain, tmp_path, store):
    mlflow = pytest.importorskip("mlflow")
    folder = tmp_path / "ws"
    uri = f"sqlite:///{folder}/runs/mlflow.db"
    if store != "sqlite":
        uri = f"sqlite:///{tmp_path}/elsewhere.db"
    tracked(plain, folder, "mlflow", **({} if store == "sqlite" else {"MLFLOW_TRACKING_URI": uri}))
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("ws").experiment_id])
    assert run.info.status == "FINISHED"
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert sorted(metric.step for metric in losses) == list(range(1, 13))
    assert client.get_metric_history(run.info.run_id, "eval_loss")
    assert run.data.params["learning_rate"] == "0.002"
    assert not [path for path in folder.iterdir() if path.name.startswith("ml")]


@pytest.mark.parametrize(
    ("name", "packages"), [("wandb", "wandb"), ("mlflow", "mlflow-skinny sqlalchemy alembic")]
)
def test_a_tracker_that_is_not_installed_is_one_line(name, packages, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StageError) as refused:
        check_installed(name)
    assert str(refused.value) == (
        f"{name} (tracking.report_to) is not installed; pip install {packages}, or set it to none: "
        "the adapter is the same"
    )
    check_installed("none")


def test_a_folder_of_that_name_is_no_tracker(tmp_path, monkeypatch):
    (tmp_path / "a_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(tracking.CALLBACKS, "a_tracker", "TensorBoardCallback")
    with pytest.raises(StageError, match=r"a_tracker .* is not installed"):
        check_installed("a_tracker")


def test_the_stage_refuses_a_tracker_before_it_trains(plain, tmp_path):
    if importlib.util.find_spec("mlflow"):
        pytest.skip("mlflow is installed")
    folder = untrained(plain, tmp_path / "ws")
    set_params(folder, tracking={"report_to": "mlflow"})
    stage = quick.Stage("train", folder)
    assert stage.wait() == 1
    assert stage.said.splitlines() == [
        "train: mlflow (tracking.report_to) is not installed; pip install mlflow-skinny sqlalchemy "
        "alembic, or set it to none: the adapter is the same"
    ]
    assert not list((folder / "checkpoints").iterdir())


class Broken:
    """A tracker of transformers whose server is gone."""

    def on_train_begin(self, *args, **kwargs):
        pass

    def on_log(self, *args, **kwargs):
        raise OSError("no route\nto host")


def begun(monkeypatch, callback) -> Tracker:
    import transformers.integrations

    monkeypatch.setattr(transformers.integrations, "TensorBoardCallback", callback)
    tracker = Tracker("tensorboard", "a-run")
    tracker.on_train_begin(SimpleNamespace(run_name=None), TrainerState(), TrainerControl())
    return tracker


def test_a_tracker_that_fails_ends_alone(monkeypatch, capsys):
    tracker, state = begun(monkeypatch, Broken), TrainerState(global_step=1)
    for _ in range(2):
        tracker.on_log(None, state, TrainerControl(), logs={"loss": 1.0})
    tracker.on_train_end(None, state, TrainerControl())
    assert capsys.readouterr().out == (
        "train: continuing without tensorboard: OSError: no route to host\n"
    )


def test_a_tracker_that_cannot_begin_is_one_line(monkeypatch):
    def none():
        raise RuntimeError("no\nkey")

    with pytest.raises(StageError) as refused:
        begun(monkeypatch, none)
    assert str(refused.value) == (
        "tensorboard (tracking.report_to) cannot start: RuntimeError: no key; fix its settings in "
        "the environment, or set it to none"
    )


def test_losses_of_held_out_and_validation_rows_are_shown(monkeypatch):
    shown = []

    class Showing(Broken):
        def on_log(self, args, state, control, logs=None, model=None):
            shown.append((args.run_name, logs))

    state = TrainerState(global_step=2)
    old = {"step": 1, "eval_loss": 9.0}
    own = [{"step": 2, "eval_loss": 2.0}, {"step": 2, "validation_loss": 3.0}]
    state.log_history = [old, *own, {"step": 2, "seconds": 5.0}]
    begun(monkeypatch, Showing).on_log(None, state, TrainerControl(), logs={"loss": 1.0})
    assert shown == [("a-run", {"loss": 1.0, "eval_loss": 2.0, "eval_validation_loss": 3.0})]


def test_one_rank_alone_shows_the_run(tmp_path, monkeypatch):
    folder = tmp_path / "project/checkpoints/key"
    folder.mkdir(parents=True)
    assert trackers("none", folder, ALONE) == []
    assert trackers("tensorboard", folder, SimpleNamespace(first=False)) == []
    assert not (tmp_path / "project/runs").exists()
    environment = {"WANDB_PROJECT": "mine"}
    monkeypatch.setattr(tracking.os, "environ", environment)
    (tracker,) = trackers("tensorboard", folder, ALONE)
    (again,) = trackers("tensorboard", folder, ALONE)
    assert tracker.run == again.run
    assert tracker.run.endswith("-key")
    # What its owner has set stays.
    assert environment["WANDB_PROJECT"] == "mine"
    assert environment["MLFLOW_EXPERIMENT_NAME"] == "project"
    assert environment["WANDB_DIR"] == str(tmp_path / "project/runs")
