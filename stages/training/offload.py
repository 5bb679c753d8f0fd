"""Layer inputs wait in host memory between the forward and the backward pass.

Both directions are copied on a stream of their own while the GPU computes. Beside the tensor at
work the GPU holds the one that left last in the forward pass, and the next one in the backward
pass.
"""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from stages.shared.host_memory import LOCKING_THREADS, pinned


class HostStash:
    """Tensors of one device, each in a slot. Slots are emptied in the reverse of their order.

    A forward pass is followed by its backward pass before the next one begins.

    size  bytes of the largest tensor that will come
    """

    def __init__(self, device: torch.device, size: int):
        self.device = device
        self.size = size
        self.stream = torch.cuda.Stream(device)
        self.slots: list[Slot] = []
        # On its way to the host, and the event of its arrival.
        self.leaving: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()
        self.threads = ThreadPoolExecutor(LOCKING_THREADS)

    def slot(self) -> "Slot":
        self.slots.append(Slot(self, len(self.slots)))
        return self.slots[-1]

    def lock_memory(self) -> None:
        """Let threads lock the memory of all slots in their order, while layers compute."""
        for slot in self.slots:
            slot.buffer = self.threads.submit(pinned, self.size)

    def let_go(self, still: int) -> None:
        """Free all but the last `still` of what left, as soon as it has arrived."""
        while len(self.leaving) > still:
            _, arrived = self.leaving.popleft()
            torch.cuda.current_stream().wait_event(arrived)


class Slot:
    def __init__(self, stash: HostStash, number: int):
        self.stash = stash
        self.number = number
        # Kept from step to step: pinning memory takes longer than many copies.
        self.buffer: Future[torch.Tensor] | None = None
        self.waiting: torch.Tensor | None = None
        self.returning: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def put(self, tensor: torch.Tensor) -> None:
        """Begin to copy `tensor`, which the stash holds until it has left."""
        stash = self.stash
        # While one layer's copies leave the next one computes.
        stash.let_go(1)
        if self.buffer is None:
            stash.lock_memory()
        assert self.buffer is not None  # Every slot of the stash has one now.
        try:
            buffer = self.buffer.result()
        except BaseException:
            # Or the threads would go on, and the process wait for them.
            stash.threads.shutdown(wait=False, cancel_futures=True)
            raise
        self.waiting = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        stash.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stash.stream):
            self.waiting.copy_(tensor, non_blocking=True)
            stash.leaving.append((tensor, stash.stream.record_event()))

    def take(self) -> torch.Tensor:
        """The tensor on the device again; that of the slot before sets out."""
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
        # Memory of the computing stream, which may still be busy with what was there before.
        tensor = torch.empty_like(self.waiting, device=self.stash.device)
        stream = self.stash.stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            tensor.copy_(self.waiting, non_blocking=True)
            self.returning = (tensor, stream.record_event())
        self.waiting = None
