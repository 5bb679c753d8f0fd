"""Keeps the best training state and stops early, by the loss on the validation rows.

They are a separate set (prepare.validation_rows), since rows that select a state cannot judge it.
"""

import math
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from stages.shared.params import Train
from stages.shared.process import StageError
from stages.shared.scoring import TOKENS_PER_BATCH
from stages.training.trainer import Trainer

# Evaluations per run; a shorter run has one per step.
VALIDATIONS = 10
# In a checkpoint: the best adapter so far.
BEST = "best_adapter.safetensors"


class Validation(TrainerCallback):
    """Scores `rows` during training, keeps the adapter with the lowest loss for train.keep: best,
    and stops after train.patience evaluations in a row without a lower one. Without rows it does
    nothing.

    Losses and adapter are saved in checkpoints for resuming. Must come before Checkpoints, which
    adds checksums and does not save when training stops early. `took`: seconds of scoring in the
    last step.

    step_tokens  as of Progress
    """

    def __init__(self, trainer: Trainer, rows: list[dict], train: Train, step_tokens: int):
        if not rows and (train.keep == "best" or train.patience is not None):
            raise StageError("data/prepared has no validation rows; dvc repro prepare makes them")
        self.trainer, self.world = trainer, trainer.world
        self.rows, self.keep, self.patience = rows, train.keep, train.patience
        self.tokens_per_batch = min(step_tokens, TOKENS_PER_BATCH)
        self.took = 0.0
        # On rank 0, in host memory.
        self.best: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / BEST
        if self.world.first and file.exists():
            self.best = load_file(file)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.took = 0.0
        if not self.rows or not is_due(state.global_step, state.max_steps):
            return
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        started = time.monotonic()
        scores = self.trainer.score(self.rows, self.tokens_per_batch)
        loss = math.fsum(scores.nll) / sum(scores.tokens)
        if not math.isfinite(loss):
            raise StageError(
                f"the validation loss is {loss} at step {state.global_step}; lower "
                "train.learning_rate"
            )
        state.log_history.append({"step": state.global_step, "validation_loss": loss})
        losses = validation_losses(state.log_history)
        best = best_step(losses)
        if self.keep == "best" and best == state.global_step and self.world.first:
            self.best = {name: p.detach().to("cpu", copy=True) for name, p in self._trained()}
        if self.patience and sum(step > best for step in losses) >= self.patience:
            control.should_training_stop = True
        self.took = time.monotonic() - started

    def on_save(self, args, state, control, **kwargs):
        if self.best:
            save_file(self.best, Path(args.output_dir) / f"checkpoint-{state.global_step}" / BEST)

    def put_back(self) -> None:
        """Restore the kept state into the model. Call it on rank 0 after training."""
        with torch.no_grad():
            for name, parameter in self._trained() if self.best else ():
                parameter.copy_(self.best[name])

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(n, p) for n, p in self.trainer.model.named_parameters() if p.requires_grad]

    def metrics(self, history: list[dict]) -> dict:
        """The kept state of a whole run, and the reason; empty without validation rows."""
        losses = validation_losses(history)
        if not losses:
            return {}
        best, last = best_step(losses), max(losses)
        after = sum(step > best for step in losses)
        why = f"lowest of {len(losses)} validation losses" if self.keep == "best" else "last state"
        if self.patience and after >= self.patience:
            why += f"; stopped early, after {after} without a lower one"
        return {
            "kept_step": best if self.keep == "best" else last,
            "kept_because": why,
            "best_validation_loss": losses[best],
            "last_validation_loss": losses[last],
        }


def is_due(step: int, steps: int) -> bool:
    """Whether the validation rows are scored after `step` of `steps`; always after the last."""
    return step * VALIDATIONS // steps > (step - 1) * VALIDATIONS // steps


def validation_losses(history: list[dict]) -> dict[int, float]:
    """Step -> mean NLL per scored token of the validation rows."""
    return {e["step"]: e["validation_loss"] for e in history if "validation_loss" in e}


def best_step(losses: dict[int, float]) -> int:
    """The first step with the lowest loss."""
    return min(losses, key=lambda step: (losses[step], step))
