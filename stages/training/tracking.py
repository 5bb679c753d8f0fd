"""Trackers that show training while it runs: TensorBoard, Weights & Biases, MLflow.

Each is a callback of transformers, configured by its own environment variables. No result depends
on one: if a tracker fails, training continues without it.
"""

import copy
import importlib
import importlib.util
import os
import time
from itertools import takewhile
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from stages.shared.process import StageError
from stages.shared.ranks import World
from stages.shared.screen import tell

# Name in tracking.report_to -> Python module.
CALLBACKS = {
    "tensorboard": "TensorBoardCallback",
    "wandb": "WandbCallback",
    "mlflow": "MLflowCallback",
}
# Names for pip. Only the logging part of MLflow: the whole would replace packages of the project.
PACKAGES = {"mlflow": "mlflow-skinny sqlalchemy alembic"}
# A resumed run is shown as the same run.
RUN_NAME = "run"


def check_installed(name: str) -> None:
    """Raise StageError when the tracker `name` cannot be imported; `none` can."""
    if name in CALLBACKS:
        spec = importlib.util.find_spec(name)
        # A folder of that name, with its runs, is not a package.
        if spec is None or spec.origin is None:
            raise StageError(
                f"{name} (tracking.report_to) is not installed; pip install "
                f"{PACKAGES.get(name, name)}, or set it to none: the adapter is the same"
            )


def trackers(name: str, folder: Path, world: World) -> list[TrainerCallback]:
    """The tracker `name` of the run with checkpoints in `folder`; only in rank 0.

    Local files go to runs/ in the project, unless the environment says otherwise.
    """
    if name not in CALLBACKS or not world.first:
        return []
    run = folder / RUN_NAME
    if not run.exists():
        run.write_text(f"{time.strftime('%Y%m%d-%H%M%S')}-{folder.name}", encoding="utf-8")
    project = folder.resolve().parents[1]
    runs = project / "runs"
    runs.mkdir(exist_ok=True)
    tracker = Tracker(name, run.read_text(encoding="utf-8"))
    for variable, value in {
        "TENSORBOARD_LOGGING_DIR": f"{runs}/{tracker.run}",
        "WANDB_DIR": str(runs),
        "WANDB_PROJECT": project.name,
        "WANDB_RUN_ID": tracker.run,
        "WANDB_RESUME": "allow",
        "MLFLOW_TRACKING_URI": f"sqlite:///{runs}/mlflow.db",
        "MLFLOW_EXPERIMENT_NAME": project.name,
    }.items():
        os.environ.setdefault(variable, value)
    return [tracker]


class Tracker(TrainerCallback):
    """transformers' callback of the tracker `name`, which also gets the losses on held-out and
    validation rows, and whose errors do not affect training. `run`: name of the run."""

    def __init__(self, name: str, run: str):
        self.name, self.run = name, run
        # None before it starts and after it failed.
        self.callback: Any = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.args = copy.copy(args)
        self.args.run_name = self.run
        try:
            integrations = importlib.import_module("transformers.integrations")
            self.callback = getattr(integrations, CALLBACKS[self.name])()
            self.callback.on_train_begin(self.args, state, control, model=model)
        except Exception as error:
            raise StageError(
                f"{self.name} (tracking.report_to) cannot start: {_brief(error)}; fix its "
                "settings in the environment, or set it to none"
            ) from None

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        own = takewhile(lambda e: e["step"] == state.global_step, reversed(state.log_history))
        names = {"eval_loss": "eval_loss", "validation_loss": "eval_validation_loss"}
        held_out = {names[k]: v for entry in own for k, v in entry.items() if k in names}
        self._call("on_log", state, control, logs=logs | held_out, model=model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._call("on_train_end", state, control, model=model)

    def _call(self, event: str, state, control, **kwargs) -> None:
        if self.callback is None:
            return
        try:
            getattr(self.callback, event)(self.args, state, control, **kwargs)
            if event == "on_train_end" and self.name == "wandb":
                # A rank exits without Python's shutdown, in which W&B would finish the run.
                self.callback._wandb.finish()
        except Exception as error:
            self.callback = None
            tell(f"train: continuing without {self.name}: {_brief(error)}")


def _brief(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
