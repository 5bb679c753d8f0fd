"""Layer inputs in host memory, with stand-ins for CUDA (tests/test_gpu.py uses a GPU)."""

import itertools
import threading
from contextlib import nullcontext
from unittest.mock import MagicMock

import pytest
import torch

from stages.shared.process import StageError
from stages.training import offload

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def streams(monkeypatch):
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())


def test_every_slot_gives_back_what_it_took(monkeypatch):
    locked = []

    def pinned(size):
        locked.append(size)
        return torch.full((size,), 255, dtype=torch.uint8)

    monkeypatch.setattr(offload, "pinned", pinned)
    stash = offload.HostStash(CPU, 6 * 4 * 2)
    slots = [stash.slot() for _ in range(5)]
    for rows in (3, 6, 1):
        values = [torch.randn(rows, 4, dtype=torch.bfloat16) for _ in slots]
        for slot, value in zip(slots, values, strict=True):
            slot.put(value)
        for slot, value in reversed(list(zip(slots, values, strict=True))):
            assert torch.equal(slot.take(), value)
    assert not stash.leaving
    assert not any(slot.waiting is not None or slot.returning for slot in slots)
    # Once for the largest, whatever comes first.
    assert locked == [48] * 5


def test_a_lock_that_is_refused_is_the_last(monkeypatch):
    numbers, asked, refused = itertools.count(1), [], threading.Event()

    def pinned(size):
        number = next(numbers)
        asked.append(number)
        if number == 3:
            raise StageError("no more")
        if number > 3:
            refused.wait(10)
        return torch.empty(size, dtype=torch.uint8)

    monkeypatch.setattr(offload, "pinned", pinned)
    stash = offload.HostStash(CPU, 8)
    slots = [stash.slot() for _ in range(20)]

    def fill():
        for slot in slots:
            slot.put(torch.zeros(4, dtype=torch.bfloat16))

    with pytest.raises(StageError, match="no more"):
        fill()
    refused.set()
    stash.threads.shutdown()
    # Besides those that the threads had begun.
    assert len(asked) <= 3 + offload.LOCKING_THREADS
