"""Divides the rows of a step among the ranks.

A step has the same rows for any number of ranks, so that the sum of the ranks' gradients is the
gradient of one GPU.
"""

import math
from collections.abc import Iterator

import torch
from datasets import Dataset
from torch.utils.data import BatchSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from stages.shared.params import Train
from stages.shared.rows import IGNORED, token_counts


def workers(train: Train, available: int) -> int:
    """Among how many of `available` devices the rows of a step can be divided evenly."""
    rows = train.batch_size * train.gradient_accumulation
    return max(n for n in range(1, available + 1) if rows % n == 0)


def share(train: Train, ranks: int) -> Train:
    """`train` for one of `ranks`: its share of a step's rows, at most `batch_size` at once."""
    rows = train.batch_size * train.gradient_accumulation // ranks
    size = max(n for n in range(1, train.batch_size + 1) if rows % n == 0)
    return train.model_copy(update={"batch_size": size, "gradient_accumulation": rows // size})


def who_works(train: Train, available: int, kind: str = "GPUs") -> str:
    """One line: how many devices are used, for which rows, and what to change to use all."""
    count, own = workers(train, available), share(train, workers(train, available))
    each = f"{own.batch_size * own.gradient_accumulation} rows of each step on each"
    if own.gradient_accumulation > 1:
        each += f", {own.batch_size} at once"
    if count == available:
        return f"uses {count} {kind}, {each}"
    raised = train.gradient_accumulation + 1
    while train.batch_size * raised % available:
        raised += 1
    return (
        f"uses {count} of {available} {kind}, {each}: train.batch_size x "
        f"train.gradient_accumulation is not divisible by {available}; set "
        f"train.gradient_accumulation: {raised} to use all"
    )


class GroupedByLength(LengthGroupedSampler):
    """transformers' order, but from the second epoch on determined by seed and epoch alone.

    transformers' own depends on all earlier draws, which a resumed run has not made.
    """

    def __init__(self, size: int, lengths: list[int], trainer):
        super().__init__(size, lengths=lengths)
        self.trainer = trainer

    def __iter__(self) -> Iterator[int]:
        if epoch := int(self.trainer.state.epoch or 0):
            self.generator = torch.Generator().manual_seed(self.trainer.args.seed + epoch)
        return super().__iter__()


class Dealt(BatchSampler):
    """Batches of row numbers for one rank of the `trainer`'s world.

    order    sampler of all rows; that of rank 0 counts
    lengths  tokens of every row: each rank's share of a step has about as many

    In the last step a batch may be empty, so that each rank has the same number of batches.
    """

    def __init__(self, order, lengths: list[int], trainer):
        self.order, self.lengths, self.trainer = order, lengths, trainer
        self.batch_size, self.drop_last = None, False  # type: ignore[assignment]

    def __len__(self) -> int:
        whole, rest = divmod(len(self.lengths), self.trainer.rows_per_step)
        size = self.trainer.args.train_batch_size
        most = math.ceil(rest / self.trainer.world.size)
        return whole * self.trainer.args.gradient_accumulation_steps + math.ceil(most / size)

    def __iter__(self) -> Iterator[list[int]]:
        world, size = self.trainer.world, self.trainer.args.train_batch_size
        if hasattr(self.order, "set_epoch"):
            self.order.set_epoch(int(self.trainer.state.epoch or 0))
        order = world.same(list(self.order))
        for start in range(0, len(order), self.trainer.rows_per_step):
            step = order[start : start + self.trainer.rows_per_step]
            # Longest first, so that the ranks' shares differ by less than a row.
            step.sort(key=lambda row: -self.lengths[row])
            own, most = step[world.rank :: world.size], math.ceil(len(step) / world.size)
            for i in range(0, most, size):
                yield own[i : i + size]


def no_rows(rows: Dataset) -> list[dict]:
    """The batch of a rank without a row: the shortest row, with nothing to learn."""
    lengths = token_counts(rows.with_format("arrow")[:])
    row = rows[min(range(len(rows)), key=lengths.__getitem__)]
    return [row | {"labels": [IGNORED] * len(row["labels"])}]
