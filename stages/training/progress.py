"""Progress of a run: a bar, the held-out loss, rates, and the curve."""

import csv
import io
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from stages.shared.device import reset_peaks
from stages.shared.outputs import write_text
from stages.shared.scoring import TOKENS_PER_BATCH
from stages.training.trainer import Trainer
from stages.training.validation import Validation

# Held-out rows scored during training: enough for a trend, few enough to be cheap.
CURVE_POINTS = 4
CURVE_ROWS = 32
CURVE_LINES = 200
WARM_STEPS = 3
# The progress so far, in a checkpoint.
COUNTS = ("seconds", "tokens", "steady_seconds", "steady_tokens")


class Progress(TrainerCallback):
    """Shows a bar and the held-out loss, and measures time and tokens.

    `seconds` is the wall time of training including data loading and warm-up, without scoring of
    held-out and validation rows; `tokens` counts all ranks. Both are saved in checkpoints, so that
    a resumed run reports its whole cost.

    step_tokens  of the largest step; scoring uses no larger batches, so that it needs no more
                 memory than training
    """

    def __init__(
        self, trainer: Trainer, held_out: list[dict], step_tokens: int, validation: Validation
    ):
        self.trainer, self.world, self.validation = trainer, trainer.world, validation
        self.held_out = held_out[:CURVE_ROWS]
        self.tokens_per_batch = min(step_tokens, TOKENS_PER_BATCH)

    def on_train_begin(self, args, state, control, **kwargs):
        saved = [entry for entry in state.log_history if "seconds" in entry]
        before = saved[-1] if saved else dict.fromkeys(COUNTS, 0)
        self.seconds, self.tokens = before["seconds"], before["tokens"]
        self.steady_seconds, self.steady_tokens = before["steady_seconds"], before["steady_tokens"]
        self.warm_steps = WARM_STEPS
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="train", disable=None
        )
        # Exclude checkpoint loading from the measured peak.
        reset_peaks()
        # This rank's share of what was added so far.
        self.counted = self.trainer.tokens
        self.mark = time.monotonic()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        every = max(1, state.max_steps // CURVE_POINTS)
        scoring = state.global_step % every == 0 or state.global_step == state.max_steps
        if model.device.type == "cuda" and (scoring or control.should_save):
            torch.cuda.synchronize()
        self._count(time.monotonic() - self.mark - self.validation.took)
        self.bar.update()
        if scoring:
            scores = self.trainer.score(self.held_out, self.tokens_per_batch)
            loss = math.fsum(scores.nll) / sum(scores.tokens)
            state.log_history.append({"step": state.global_step, "eval_loss": loss})
        if control.should_save:
            counts = (self.seconds, self.tokens, self.steady_seconds, self.steady_tokens)
            saved = dict(zip(COUNTS, counts, strict=True))
            state.log_history.append({"step": state.global_step, **saved})
        self.mark = time.monotonic()

    def _count(self, seconds: float) -> None:
        """Add a step. The first steps of a process are not representative."""
        self.seconds += seconds
        tokens = sum(self.world.gather(self.trainer.tokens - self.counted))
        self.counted = self.trainer.tokens
        self.tokens += tokens
        if self.warm_steps:
            self.warm_steps -= 1
        else:
            self.steady_seconds += seconds
            self.steady_tokens += tokens

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            shown = {"loss": f"{logs['loss']:.3f}"}
            if self.steady_seconds:
                shown["tokens/s"] = f"{self.steady_tokens / self.steady_seconds:.0f}"
            self.bar.set_postfix(shown)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()

    def cost(self) -> dict[str, float]:
        """Seconds and rates of the whole run.

        The steady rate excludes the first WARM_STEPS steps of every process, unless hardly any
        steps remain.
        """
        seconds, tokens = self.seconds, self.tokens
        steady = seconds, tokens
        if 2 * self.steady_tokens >= tokens:
            steady = self.steady_seconds, self.steady_tokens
        return {
            "train_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "steady_tokens_per_second": steady[1] / steady[0],
        }


def write_curve(path: Path, history: list[dict], kept_step: int | None = None) -> None:
    """Write about CURVE_LINES lines, with the mean loss since the previous line.

    kept_step  step of the kept state, if validation rows were scored: its loss is in `kept`
    """
    columns = ["step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm"]
    if kept_step is not None:
        columns += ["validation_loss", "kept"]
    steps: dict[int, dict] = {}
    for entry in history:
        known = {key: entry[key] for key in columns if key in entry}
        steps.setdefault(entry["step"], {}).update(known)
    if kept_step is not None:
        steps[kept_step]["kept"] = steps[kept_step]["validation_loss"]
    every, losses = math.ceil(len(steps) / CURVE_LINES), []
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for step, line in sorted(steps.items()):
        losses.append(line["loss"])
        scored = line.keys() & {"eval_loss", "validation_loss"}
        if step % every == 0 or step == max(steps) or scored:
            line["loss"] = math.fsum(losses) / len(losses)
            losses.clear()
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()})
    write_text(path, text.getvalue())


def mean_loss(history: list[dict]) -> float:
    """Mean over all steps; the trainer's own omits those before a resume."""
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return math.fsum(losses) / len(losses)
