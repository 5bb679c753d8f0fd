"""One merged tensor: its values, their order, and values that a 16-bit type cannot hold."""

import os
from types import SimpleNamespace

import pytest
import torch

from stages.shared import merging, weights
from stages.shared.merging import RowBlock, check_rounding, merged_rows
from stages.shared.process import StageError

CPU = torch.device("cpu")
NAME = "w.weight"
DTYPES = [torch.float16, torch.bfloat16]


class Update:
    """A low-rank update of a weight [rows, 8] that lies in memory."""

    scaling = 1.7

    def __init__(self, rows):
        torch.manual_seed(1)
        self.a, self.b = torch.randn(3, 8), torch.randn(rows, 3)

    rounded_first = False

    def deltas(self, device):
        return lambda block: (self.b[block] @ self.a) * self.scaling


def weights_of(tensor, nf4=()):
    def reader(name, device):
        assert (name, device) == (NAME, CPU)
        return lambda block: tensor[block]

    return SimpleNamespace(nf4=set(nf4), shapes={NAME: tuple(tensor.shape)}, reader=reader)


@pytest.fixture
def in_blocks(monkeypatch):
    """Blocks of four rows."""
    monkeypatch.setattr(weights, "UNIT_ROWS", 4)
    monkeypatch.setattr(weights, "BLOCK_VALUES", 32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_update_is_added_in_float32_and_rounded_once(in_blocks, dtype):
    torch.manual_seed(0)
    # Values that neither type holds.
    tensor, update = torch.randn(50, 8), Update(50)
    blocks = list(merged_rows(weights_of(tensor), NAME, update, dtype, CPU))
    assert len(blocks) > 10
    found = torch.cat([block.values for block in blocks])
    assert found.dtype == dtype
    sums = (update.b @ update.a).double() * update.scaling + tensor.to(dtype).double()
    expected = sums.float().to(dtype)
    # Float32 rounds too, rarely, by one step of the type.
    assert torch.allclose(found.float(), expected.float(), rtol=0.01)
    assert (found != expected).sum() < 5
    assert {block[1:] for block in blocks} == {(0, 0, 0, 0.0)}
    # Rounding only at the end, or before the product too, gives many other values.
    assert ((update.b @ update.a * update.scaling + tensor).to(dtype) != found).sum() > 20
    twice = (update.b @ update.a * update.scaling).to(dtype) + tensor.to(dtype)
    assert (twice != found).sum() > 20


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_without_an_update_is_rounded(in_blocks, dtype):
    torch.manual_seed(0)
    tensor = torch.randn(50, 8)
    found = [block.values for block in merged_rows(weights_of(tensor), NAME, None, dtype, CPU)]
    assert torch.equal(torch.cat(found), tensor.to(dtype))


def test_what_needs_no_computing_stays_on_the_cpu():
    """`weights_of` holds the reader to it: there is no device `meta` to read to."""
    tensor, meta = torch.ones(4, 8), torch.device("meta")
    [block] = merged_rows(weights_of(tensor), NAME, None, torch.float16, meta)
    assert torch.equal(block.values, tensor.half())
    with pytest.raises(AssertionError):
        list(merged_rows(weights_of(tensor, nf4=[NAME]), NAME, None, torch.float16, meta))


LOST = {
    "nothing": ([1.0, -2.0, 0.0], torch.float16, (0, 0, 0, 0.0)),
    "zeros of both signs": ([0.0, -0.0, 1.0], torch.float16, (0, 0, 0, 0.0)),
    "too small": ([1e-9, -1e-9, 0.0, 1.0, 6e-8], torch.float16, (0, 0, 2, 0.0)),
    "too small for neither": ([1e-9, 1.0], torch.bfloat16, (0, 0, 0, 0.0)),
    "all too small": ([1e-9, 1e-9], torch.float16, (0, 0, 2, 0.0)),
    "too large": ([7e4, -9e4, 1.0, 6e4], torch.float16, (2, 0, 0, 9e4)),
    "the largest": ([65504.0, -65504.0], torch.float16, (0, 0, 0, 0.0)),
    "large for one only": ([7e4, 1.0], torch.bfloat16, (0, 0, 0, 0.0)),
    "too large for both": ([3.4e38, 1.0], torch.bfloat16, (1, 0, 0, 3.4e38)),
    "infinite": ([float("inf"), 7e4, 1.0], torch.float16, (1, 1, 0, float("inf"))),
    "infinite below": ([-float("inf"), 1e-9], torch.bfloat16, (0, 1, 0, float("inf"))),
    "both ends": ([1e-9, 7e4], torch.float16, (1, 0, 1, 7e4)),
}


@pytest.mark.parametrize("case", LOST)
def test_what_the_type_cannot_hold_is_counted(case):
    values, dtype, expected = LOST[case]
    exact = torch.tensor(values)
    block = merging._rounded(exact, dtype)
    assert torch.equal(block.values, exact.to(dtype))
    overflowed, broken, flushed, largest = expected
    assert block[1:] == (overflowed, broken, flushed, float(torch.tensor(largest)))


def test_nan_is_broken_and_not_overflowed():
    block = merging._rounded(torch.tensor([float("nan"), 7e4, 1e-9]), torch.float16)
    assert (block.overflowed, block.broken, block.flushed) == (1, 1, 1)


@pytest.mark.parametrize("count", [0, 1, 3, 20])
def test_results_come_in_order_a_few_ahead(monkeypatch, count):
    # The cores of this process, which is 0.
    monkeypatch.setattr(os, "sched_getaffinity", {0: {4, 5}}.__getitem__)
    taken = []

    def items():
        for item in range(count):
            taken.append(item)
            yield item

    found = []
    for done, result in enumerate(merging._in_order(lambda item: item * item, items())):
        found.append(result)
        # One for each core, and the one that is waited for.
        assert len(taken) == min(count, done + 3)
    assert found == [item * item for item in range(count)]


def test_a_fault_in_a_thread_is_told():
    def fails(item):
        raise ValueError(item)

    with pytest.raises(ValueError, match="7"):
        list(merging._in_order(fails, [7]))


def block(size=100, dtype=torch.float16, overflowed=0, broken=0, flushed=0, largest=0.0):
    return RowBlock(torch.zeros(size, dtype=dtype), overflowed, broken, flushed, largest)


def test_values_pass_and_what_became_zero_is_counted():
    flushed, blocks = {}, [block(flushed=1), block(), block(flushed=2)]
    found = list(check_rounding(NAME, iter(blocks), flushed))
    assert all(a is b.values for a, b in zip(found, blocks, strict=True))
    assert flushed == {NAME: 3}
    # One in a hundred, and one more.
    with pytest.raises(StageError) as fault:
        list(check_rounding(NAME, iter([block(flushed=1), block(), block(flushed=3)]), flushed))
    assert str(fault.value) == (
        "w.weight: 4 of 300 values become zero in float16; set merge.dtype: bfloat16"
    )


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (block(broken=1), "w.weight: NaN or infinite values in the base; fetch it again"),
        (
            block(broken=1, overflowed=1),
            "w.weight: NaN or infinite values in the base; fetch it again",
        ),
        (
            block(overflowed=2, largest=70123.0),
            "w.weight: 2 values overflow float16 (largest 7.01e+04); set merge.dtype: bfloat16",
        ),
        (
            block(dtype=torch.bfloat16, overflowed=1, largest=3.4e38),
            "w.weight: 1 values overflow bfloat16 (largest 3.4e+38); set merge.dtype: bfloat16",
        ),
    ],
)
def test_values_that_are_lost_end_the_merge(bad, said):
    found = check_rounding(NAME, iter([block(), bad]), {})
    next(found)
    with pytest.raises(StageError) as fault:
        next(found)
    assert str(fault.value) == said
