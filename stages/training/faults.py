"""Detects failed training at the step where it happens.

A step is checked before its checkpoint is written, so that no checkpoint contains a broken adapter.
"""

import math
import statistics
from collections import deque

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import TrainerCallback

from stages.shared.process import StageError
from stages.shared.ranks import ALONE, World

# The loss has exploded if it exceeds the median of earlier steps by this many nats (a perplexity
# seven times as high) for this many steps in a row, so that one hard row does not count.
EXPLODED_NATS = 2.0
EXPLODED_STEPS = 5
MEDIAN_STEPS = 100
# By then every schedule has had a learning rate above zero.
MOVED_BY_STEP = 5
NAMED_ROWS = 8
READ_ROWS = 10_000


class Faults(TrainerCallback):
    """Stops training with the step, the rows of its batches, and what to try.

    rows: train.arrow with its column `row`. The trainer must log every step, on all ranks alike,
    so that each names the rows of all.
    """

    def __init__(self, rows: Dataset, world: World = ALONE):
        self.rows, self.world = rows, world
        self.losses: deque[float] = deque(maxlen=MEDIAN_STEPS)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.batches: deque[dict] = deque(maxlen=args.gradient_accumulation_steps)
        self.hook = model.register_forward_pre_hook(
            lambda module, positional, inputs: self.batches.append(inputs), with_kwargs=True
        )
        self.losses.extend(entry["loss"] for entry in state.log_history if "loss" in entry)

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if "loss" not in logs:
            return
        loss, norm = logs["loss"], logs["grad_norm"]
        if not math.isfinite(loss):
            self._stop(state, f"the loss is {loss}", "check these rows, or lower {rate}")
        if not math.isfinite(norm):
            self._stop(state, f"the gradient's norm is {norm}", "lower {rate}")
        self.losses.append(loss)
        recent, before = list(self.losses)[-EXPLODED_STEPS:], list(self.losses)[:-EXPLODED_STEPS]
        if len(before) >= EXPLODED_STEPS:
            median = statistics.median(before)
            if min(recent) > median + EXPLODED_NATS:
                reason = f"the loss exploded to {loss:.2f}, from a median of {median:.2f}"
                self._stop(state, reason, "lower {rate} or raise train.warmup_ratio")
        if state.global_step == min(MOVED_BY_STEP, state.max_steps) and not moved(model):
            self._stop(state, "the adapter does not change", "raise {rate} or change {targets}")

    def on_train_end(self, args, state, control, **kwargs):
        self.hook.remove()

    def _stop(self, state, reason: str, remedy: str) -> None:
        own = row_names(filter(has_labels, self.batches), self.rows)
        names = [name for of_rank in self.world.gather(own) for name in of_rank]
        shown = ", ".join(names[:NAMED_ROWS]) + (", …" if len(names) > NAMED_ROWS else "")
        remedy = remedy.format(rate="train.learning_rate", targets="lora.target_modules")
        raise StageError(f"{reason} at step {state.global_step} (rows {shown}); {remedy}")


def moved(model: torch.nn.Module) -> bool:
    """Whether training has changed the adapter: every B starts as zero (LoRA, section 4.1)."""
    return any(p.any().item() for name, p in model.named_parameters() if ".lora_B." in name)


def has_labels(batch: dict) -> bool:
    """Whether `batch` has learned tokens; that of a rank without rows has none."""
    return "labels" not in batch or bool((batch["labels"] >= 0).any())


def row_names(batches, rows: Dataset) -> list[str]:
    """Names of the rows in `batches` (inputs of the model, padded or packed).

    Reads READ_ROWS of `rows` at a time, as Arrow, and no more than necessary, since all rows as
    Python values may not fit in memory.
    """
    wanted = [ids for batch in batches for ids in sequences(batch)]
    whole: dict[tuple[int, ...], str] = {}
    # Packing may cut a row, so rows that begin like it match.
    longer: dict[tuple[int, ...], str] = {}
    for table in rows.with_format("arrow").iter(READ_ROWS):
        for ids in set(wanted) - whole.keys():
            for number, length in begun(table["input_ids"], ids):
                found = whole if length == len(ids) else longer
                found.setdefault(ids, table["row"][number].as_py())
        if len(whole) == len(set(wanted)):
            break
    return [whole.get(ids) or longer.get(ids, "?") for ids in wanted]


def begun(column: pa.ChunkedArray, ids: tuple[int, ...]) -> list[tuple[int, int]]:
    """Number and length of each list in `column` that begins with `ids`."""
    lengths = pc.list_value_length(column).to_numpy()
    values = pc.list_flatten(column).to_numpy()
    starts = lengths.cumsum() - lengths
    rows = (lengths >= len(ids)).nonzero()[0]
    for place, token in enumerate(ids):
        rows = rows[values[starts[rows] + place] == token]
        if not len(rows):
            break
    return [(int(row), int(lengths[row])) for row in rows]


def sequences(batch: dict) -> list[tuple[int, ...]]:
    """Token ids of each row in a batch [rows, width] padded on the right, or [1, tokens] packed."""
    ids = batch["input_ids"].tolist()
    mask = batch.get("attention_mask")
    if mask is not None:
        return [tuple(row[:n]) for row, n in zip(ids, mask.sum(dim=1).tolist(), strict=True)]
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    return [tuple(ids[0][a:b]) for a, b in zip(starts, [*starts[1:], None], strict=True)]
