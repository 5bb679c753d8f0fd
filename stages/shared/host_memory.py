"""Page-locked host memory for copies to and from a GPU, shared between processes."""

import os
import weakref
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from stages.shared.outputs import GB
from stages.shared.process import StageError

# More threads contend for the driver's lock and delay kernel launches.
LOCKING_THREADS = 2


def available_bytes() -> int:
    """Free memory in bytes: the machine's, or its control group's if less."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    available = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        return min(available, int(limit) - int(used))
    except (OSError, ValueError):
        # No control group of version 2, or one without a limit.
        return available


def lock(buffer: torch.Tensor) -> str | None:
    """Page-lock a contiguous buffer until it is freed; returns the driver's error, if any.

    torch's own pinned memory is rounded up to a power of two and paged in by a single core.
    """
    runtime = torch.cuda.cudart()
    status = runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)
    if status != runtime.cudaError.success:
        return str(status)
    weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr())
    return None


def pinned(size: int, what: str = "layer inputs") -> torch.Tensor:
    """`size` bytes of page-locked host memory, uint8, for `what`.

    Raises StageError if the system does not allow it.
    """
    buffer = torch.empty(size, dtype=torch.uint8).zero_()
    if refusal := lock(buffer):
        raise StageError(
            f"{size / GB:.2f} GB of host memory for {what} cannot be page-locked ({refusal}); "
            "free host memory or lower train.batch_size"
        )
    return buffer


class HostBuffers:
    """Buffers of host memory, uint8, to be used again.

    gpu  page-locked, if the system allows it. To lock one takes longer than to copy its bytes
         several times, so threads do it ahead of use
    """

    def __init__(self, gpu: bool):
        self.gpu, self.threads = gpu, ThreadPoolExecutor(LOCKING_THREADS)
        # (bytes, buffer) of the unused ones.
        self.free: list[tuple[int, Future[torch.Tensor]]] = []

    def ask(self, sizes: Iterable[int]) -> None:
        """Let threads make what is missing for buffers of at least `sizes` bytes each, with those
        that are too small given up."""
        spare, missing = sorted(self.free, key=lambda one: one[0]), list[int]()
        for size in sorted(sizes, reverse=True):
            if spare and spare[-1][0] >= size:
                spare.pop()
            else:
                missing.append(size)
        for size in missing:
            if spare:
                # Or it would stay beside the new one, and the memory of all would grow.
                given_up = spare.pop(0)
                self.free.remove(given_up)
                given_up[1].cancel()
            self.free.append((size, self.threads.submit(self._made, size)))

    def take(self, size: int) -> torch.Tensor:
        """The smallest unused one of at least `size` bytes."""
        self.ask([size])
        smallest = min((one for one in self.free if one[0] >= size), key=lambda one: one[0])
        self.free.remove(smallest)
        return smallest[1].result()

    def put(self, buffer: torch.Tensor) -> None:
        """Return a buffer."""
        unused = Future[torch.Tensor]()
        unused.set_result(buffer)
        self.free.append((buffer.nbytes, unused))

    def cancel(self) -> None:
        """Forget those not yet begun, and those that could not be made."""
        kept = [(size, made) for size, made in self.free if not made.cancel()]
        self.free = [(size, made) for size, made in kept if not made.done() or not made.exception()]

    def _made(self, size: int) -> torch.Tensor:
        buffer = torch.empty(size, dtype=torch.uint8)
        if self.gpu:
            # Unlocked, copies take longer.
            lock(buffer.zero_())
        return buffer


def shared_buffer(size: int, path: str | None = None) -> tuple[torch.Tensor, str]:
    """(`size` bytes, uint8, the path by which other processes of this user can map it).

    path  of another process's buffer; None for a new one. It has no name in any folder, so it
          vanishes when the last process that maps it ends.
    """
    if path is None:
        file = os.memfd_create("weights")
        os.ftruncate(file, size)
        path = f"/proc/{os.getpid()}/fd/{file}"
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8), path
