"""Which rows of a step each rank computes: those of one GPU's step, dealt out.

Every step has the rows that it has on one GPU, whatever the number of ranks, so that the sum of
the ranks' gradients is one GPU's gradient.
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
    """How many of `available` devices the rows of a step can be dealt to evenly."""
    rows = train.batch_size * train.gradient_accumulation
    return max(n for n in range(1, available + 1) if rows % n == 0)


def share(train: Train, ranks: int) -> Train:
    """`train` as one of `ranks` has it: so many rows of a step, at most `batch_size` at once."""
    rows = train.batch_size * train.gradient_accumulation // ranks
    size = max(n for n in range(1, train.batch_size + 1) if rows % n == 0)
    return train.model_copy(update={"batch_size": size, "gradient_accumulation": rows // size})


def who_works(train: Train, available: int, kind: str = "GPUs") -> str:
    """One line: how many devices work, on what, and what to raise for all to."""
    count, own = workers(train, available), share(train, workers(train, available))
    each = f"{own.batch_size * own.gradient_accumulation} rows of each step on each"
    if own.gradient_accumulation > 1:
        each += f", {own.batch_size} at once"
    if count == available:
        return f"{count} {kind} work, {each}"
    raised = train.gradient_accumulation + 1
    while train.batch_size * raised % available:
        raised += 1
    return (
        f"{count} of {available} {kind} work, {each}: train.batch_size x "
        f"train.gradient_accumulation does not divide by {available}; with "
        f"train.gradient_accumulation: {raised} all do"
    )


class GroupedByLength(LengthGroupedSampler):
    """transformers' order, which from the second epoch on depends on the seed and the epoch alone.

    Its own then depends on all that was drawn before, which a run that goes on did not draw.
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

    A batch has no row where a last step has too few for all: each rank has as many batches.
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
            # Longest first: the ranks' shares differ by less than a row.
            step.sort(key=lambda row: -self.lengths[row])
            own, most = step[world.rank :: world.size], math.ceil(len(step) / world.size)
            for i in range(0, most, size):
                yield own[i : i + size]


def no_rows(rows: Dataset) -> list[dict]:
    """What a rank without a row computes: the shortest row, of which nothing is learned."""
    lengths = token_counts(rows.with_format("arrow")[:])
    row = rows[min(range(len(rows)), key=lengths.__getitem__)]
    return [row | {"labels": [IGNORED] * len(row["labels"])}]
