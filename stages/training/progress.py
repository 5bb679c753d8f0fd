"""What a run tells while it trains and afterwards: a bar, the held-out loss, rates, the curve."""

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
from stages.shared.scoring import TOKENS_PER_BATCH, score
from stages.training.trainer import Trainer

# The held-out loss along the way: enough rows to see a trend, few enough to cost little.
CURVE_POINTS = 4
CURVE_ROWS = 32
CURVE_LINES = 200
WARM_STEPS = 3


class Progress(TrainerCallback):
    """One bar, the held-out loss along the way, and the clock.

    `seconds` is the wall time of training with its data loading and warm-up, without the scoring
    of held-out rows. It travels in the checkpoints: a resumed run reports its whole cost.

    step_tokens  of the largest step: scoring takes no more at once, so that the memory that was
                 predicted, and tried when training began, is enough for it
    """

    def __init__(self, trainer: Trainer, held_out: list[dict], step_tokens: int):
        self.trainer, self.world = trainer, trainer.world
        self.held_out = held_out[:CURVE_ROWS]
        self.tokens_per_batch = min(step_tokens, TOKENS_PER_BATCH)
        self.seconds = 0.0
        self.warm: tuple[float, int] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.seconds = max((entry.get("seconds", 0.0) for entry in state.log_history), default=0.0)
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="train", disable=None
        )
        # What loading a checkpoint takes is not of training.
        reset_peaks()
        self.mark = time.monotonic()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        every = max(1, state.max_steps // CURVE_POINTS)
        scoring = state.global_step % every == 0 or state.global_step == state.max_steps
        if model.device.type == "cuda" and (scoring or control.should_save):
            torch.cuda.synchronize()
        self.seconds += time.monotonic() - self.mark
        self.bar.update()
        if scoring:
            scores = score(model, self.held_out, self.tokens_per_batch, self.world)
            loss = math.fsum(scores.nll) / sum(scores.tokens)
            state.log_history.append({"step": state.global_step, "eval_loss": loss})
        if control.should_save:
            state.log_history.append({"step": state.global_step, "seconds": self.seconds})
        self.mark = time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.last = (self.seconds, sum(self.world.gather(self.trainer.tokens)))
            if state.global_step >= WARM_STEPS and self.warm is None:
                self.warm = self.last
            shown = {"loss": f"{logs['loss']:.3f}"}
            if self.warm and self.last != self.warm:
                (seconds, tokens), (before, warm) = self.last, self.warm
                shown["tokens/s"] = f"{(tokens - warm) / (seconds - before):.0f}"
            self.bar.set_postfix(shown)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()

    def cost(self, tokens: int) -> dict[str, float]:
        """Seconds and rates of a whole run over `tokens` tokens.

        The steady rate is that after WARM_STEPS steps, or of all steps when hardly any follow.
        """
        (seconds, counted), (before, warm) = self.last, self.warm or (0.0, 0)
        if counted < 2 * warm:
            before, warm = 0.0, 0
        return {
            "train_seconds": self.seconds,
            "tokens_per_second": tokens / self.seconds,
            "steady_tokens_per_second": (counted - warm) / (seconds - before),
        }


def write_curve(path: Path, history: list[dict]) -> None:
    """About CURVE_LINES lines, the loss as the mean since the line before."""
    columns = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm")
    steps: dict[int, dict] = {}
    for entry in history:
        known = {key: entry[key] for key in columns if key in entry}
        steps.setdefault(entry["step"], {}).update(known)
    every, losses = math.ceil(len(steps) / CURVE_LINES), []
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for step, line in sorted(steps.items()):
        losses.append(line["loss"])
        if step % every == 0 or step == max(steps) or "eval_loss" in line:
            line["loss"] = math.fsum(losses) / len(losses)
            losses.clear()
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()})
    write_text(path, text.getvalue())


def mean_loss(history: list[dict]) -> float:
    """Mean over all steps. The trainer's own leaves out those before a resume."""
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return math.fsum(losses) / len(losses)
