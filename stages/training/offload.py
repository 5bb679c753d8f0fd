"""Keeps layer inputs in host memory between the forward and the backward pass.

Copies in both directions run on their own streams while the GPU computes. Beside the current
tensor, the GPU holds the last one sent in the forward pass, and the next one in the backward pass.
"""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from stages.shared.host_memory import LOCKING_THREADS, pinned


class HostStash:
    """Tensors of one device, each in a slot; slots are emptied in reverse order.

    Each forward pass is followed by its backward pass before the next one starts.

    size  bytes of the largest tensor
    """

    def __init__(self, device: torch.device, size: int):
        self.device = device
        self.size = size
        self.stream = torch.cuda.Stream(device)
        self.slots: list[Slot] = []
        # Tensors being copied to the host, and the events of their arrival.
        self.leaving: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()
        self.threads = ThreadPoolExecutor(LOCKING_THREADS)

    def slot(self) -> "Slot":
        self.slots.append(Slot(self, len(self.slots)))
        return self.slots[-1]

    def lock_memory(self) -> None:
        """Let threads page-lock the memory of all slots in order, while layers compute."""
        for slot in self.slots:
            slot.buffer = self.threads.submit(pinned, self.size)

    def let_go(self, still: int) -> None:
        """Free all but the last `still` tensors that were sent, once they have arrived."""
        while len(self.leaving) > still:
            _, arrived = self.leaving.popleft()
            torch.cuda.current_stream().wait_event(arrived)


class Slot:
    def __init__(self, stash: HostStash, number: int):
        self.stash = stash
        self.number = number
        # Kept across steps, since pinning memory takes longer than many copies.
        self.buffer: Future[torch.Tensor] | None = None
        self.waiting: torch.Tensor | None = None
        self.returning: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def put(self, tensor: torch.Tensor) -> None:
        """Start to copy `tensor`, which the stash holds until the copy is done."""
        stash = self.stash
        # While one layer's copies leave the next one computes.
        stash.let_go(1)
        if self.buffer is None:
            stash.lock_memory()
        assert self.buffer is not None  # Every slot of the stash has one now.
        try:
            buffer = self.buffer.result()
        except BaseException:
            # Otherwise the threads would continue, and the process wait for them.
            stash.threads.shutdown(wait=False, cancel_futures=True)
            raise
        self.waiting = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        stash.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stash.stream):
            self.waiting.copy_(tensor, non_blocking=True)
            stash.leaving.append((tensor, stash.stream.record_event()))

    def take(self) -> torch.Tensor:
        """The tensor, back on the device; starts to copy that of the previous slot."""
        stash = self.stash
        stash.let_go(0)
        self.set_out()
        if self.number:
            stash.slots[self.number - 1].set_out()
        assert self.returning is not None  # `put` comes before `take`.
        tensor, arrived = self.returning
        self.returning = None
        torch.cuda.current_stream().wait_event(arrived)
        return tensor

    def set_out(self) -> None:
        if self.waiting is None:
            return
        # The memory belongs to the computing stream, which may still be using it.
        tensor = torch.empty_like(self.waiting, device=self.stash.device)
        stream = self.stash.stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            tensor.copy_(self.waiting, non_blocking=True)
            self.returning = (tensor, stream.record_event())
        self.waiting = None
