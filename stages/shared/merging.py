"""The streamed merge of one tensor, and a check for values that a 16-bit type cannot represent.

Memory grows neither with the number nor with the width of layers: only some row blocks, one
weight's NF4 scales and its two factors are in memory. On the same device the result is
bit-identical to PEFT's in-memory merge (`merge_and_unload(safe_merge=False)`) of the base in the
target type.
"""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from stages.shared.adapter import Change, Rows
from stages.shared.embeddings import mean_row
from stages.shared.process import StageError
from stages.shared.weights import Weights, row_blocks

# float16 rounds values below 2^-25 to zero. Normally distributed weights of width 0.02 lose one
# value in a million; a tensor that loses this share is too small for the type.
MAX_FLUSHED_SHARE = 0.01
# What the blocks of a tensor take together, with as many float32 copies of each while it is made.
AHEAD_BYTES, COPIES = 2**30, 3
# The bits of infinity; those of NaN, without the sign, are larger.
INFINITY = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80}


class RowBlock(NamedTuple):
    """A row block of a merged tensor, and how many values its 16-bit type cannot represent."""

    values: torch.Tensor
    overflowed: int  # finite before rounding, infinite after
    broken: int  # NaN or infinite already before
    flushed: int  # nonzero before, zero after
    largest: float  # magnitude before rounding, where something overflowed


def merged_rows(
    weights: Weights,
    name: str,
    update: Change | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[RowBlock]:
    """Yield the tensor `name` with its update in row blocks, computed on all cores.

    The order of operations is that of `weight.data += delta` in peft/tuners/lora/layer.py: the
    weight rounded to `dtype`, plus (B A) * scaling in float32, rounded once. Of experts PEFT rounds
    the product to `dtype` as well.
    """
    if isinstance(update, Rows):
        yield from _with_rows(weights, name, update, dtype)
        return
    if update:
        deltas = update.deltas(device)
    elif name not in weights.nf4:
        device = torch.device("cpu")  # Nothing to compute.
    read = weights.reader(name, device)

    def merged(block: slice) -> RowBlock:
        part = read(block)
        if update:
            exact = deltas(block)
            if update.rounded_first:
                exact = exact.to(dtype).float()
            exact += part.to(dtype)
        else:
            exact = part
        return _rounded(exact, dtype)

    blocks = row_blocks(weights.shapes[name], device)
    yield from _in_order(merged, blocks, side_by_side(weights.shapes[name], blocks))


def merged_shape(weights: Weights, name: str, update: Change | None) -> tuple[int, ...]:
    """Shape of the merged tensor, which may have rows of new tokens beyond the base's."""
    shape = weights.shapes[name]
    if not isinstance(update, Rows):
        return shape
    return (max(shape[0], update.count), *shape[1:])


def _with_rows(weights: Weights, name: str, update: Rows, dtype: torch.dtype) -> Iterator[RowBlock]:
    """The base's rows with those of `update` in place; rows between are filled by `extended`."""
    device, own = torch.device("cpu"), weights.shapes[name][0]
    read, values = weights.reader(name, device), update.values()
    shape = merged_shape(weights, name, update)
    mean = mean_row(read, own).float() if shape[0] > own else torch.empty(0)

    def merged(block: slice) -> RowBlock:
        part = read(slice(block.start, min(block.stop, own))).float() if block.start < own else None
        further = mean.expand(block.stop - max(block.start, own), -1) if block.stop > own else None
        exact = torch.cat([rows for rows in (part, further) if rows is not None])
        for i, id in enumerate(update.ids):
            if block.start <= id < block.stop:
                exact[id - block.start] = values[i]
        return _rounded(exact, dtype)

    blocks = row_blocks(shape, device)
    yield from _in_order(merged, blocks, side_by_side(shape, blocks))


def _rounded(exact: torch.Tensor, dtype: torch.dtype) -> RowBlock:
    values = exact.to(dtype)
    # Without the sign, floats compare like their bits, which are much faster to scan.
    bits = values.view(torch.int16) & 0x7FFF
    low, high = bits.aminmax()
    overflowed = broken = flushed = 0
    largest = 0.0
    if low == 0:
        flushed = int(exact.count_nonzero() - bits.count_nonzero())
    if high >= INFINITY[dtype]:
        broken = int((~exact.isfinite()).sum())
        overflowed = int((~values.isfinite()).sum()) - broken
        largest = float(exact.abs().max())
    return RowBlock(values.cpu(), overflowed, broken, flushed, largest)


def side_by_side(shape: tuple[int, ...], blocks: list[slice]) -> int:
    """How many blocks of a tensor are computed at once: one on each core, or as many as AHEAD_BYTES
    hold (an expert of gpt-oss takes 66 MB in float32)."""
    row = torch.Size(shape[1:]).numel()
    largest = max((block.stop - block.start for block in blocks), default=1) * row
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, AHEAD_BYTES // max(1, COPIES * 4 * largest)))


def _in_order(function, items: list, workers: int | None = None) -> Iterator:
    """function(item) for each, a few ahead of what is consumed.

    workers  threads; None for as many as cores
    """
    workers = workers or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def check_rounding(name: str, blocks: Iterator[RowBlock], flushed: dict) -> Iterator[torch.Tensor]:
    """Yield the values of `merged_rows`, and count in `flushed` those that became zero.

    Raises StageError naming the tensor if a value is not finite or overflows, or if more than
    MAX_FLUSHED_SHARE became zero.
    """
    size = flushed[name] = 0
    for block in blocks:
        kind = str(block.values.dtype).removeprefix("torch.")
        if block.broken:
            raise StageError(f"{name}: NaN or infinite values in the base; fetch it again")
        if block.overflowed:
            raise StageError(
                f"{name}: {block.overflowed} values overflow {kind} (largest {block.largest:.3g}); "
                "set merge.dtype: bfloat16"
            )
        size += block.values.numel()
        flushed[name] += block.flushed
        yield block.values
    if flushed[name] > MAX_FLUSHED_SHARE * size:
        raise StageError(
            f"{name}: {flushed[name]} of {size} values become zero in {kind}; "
            "set merge.dtype: bfloat16"
        )
