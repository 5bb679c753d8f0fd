"""Layer inputs wait in host memory between the forward and the backward pass.

Both directions are copied on a stream of their own while the GPU computes. In the backward pass,
which takes the slots in reverse order, the GPU holds the tensor at work and the one on its way
back; in the forward pass none but the tensor at work.
"""

import weakref

import torch

from stages.shared.stage import StageError


class HostStash:
    """Tensors of one device by slot 0, 1, …, put in ascending and taken in descending order."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        # Kept from step to step: pinning memory takes longer than many copies.
        self.buffers: dict[int, torch.Tensor] = {}
        self.waiting: dict[int, torch.Tensor] = {}
        self.returning: dict[int, tuple[torch.Tensor, torch.cuda.Event]] = {}

    def put(self, slot: int, tensor: torch.Tensor) -> torch.cuda.Event:
        """Begin to copy `tensor`, which must not be freed before a wait for the event."""
        buffer = self.buffers.get(slot)
        if buffer is None or buffer.numel() < tensor.numel() or buffer.dtype != tensor.dtype:
            # An earlier copy out of the buffer that goes may still be under way.
            self.stream.synchronize()
            self.buffers[slot] = buffer = pinned(tensor.numel(), tensor.dtype)
        host = self.waiting[slot] = buffer[: tensor.numel()].view(tensor.shape)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            host.copy_(tensor, non_blocking=True)
            return self.stream.record_event()

    def take(self, slot: int) -> torch.Tensor:
        """The tensor of `slot` on the device again; the one below it sets out."""
        for wanted in (slot, slot - 1):
            if wanted in self.waiting:
                self._bring_back(wanted)
        tensor, arrived = self.returning.pop(slot)
        torch.cuda.current_stream().wait_event(arrived)
        return tensor

    def _bring_back(self, slot: int) -> None:
        host = self.waiting.pop(slot)
        # Memory of the computing stream, which may still be busy with what was there before.
        tensor = torch.empty_like(host, device=self.device)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            tensor.copy_(host, non_blocking=True)
            self.returning[slot] = (tensor, self.stream.record_event())


def pinned(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Page-locked host memory for `count` values.

    torch's own pinned memory is rounded up to a power of two and faulted in by a single core.
    Raises StageError when the system does not allow it.
    """
    buffer = torch.empty(count, dtype=dtype).zero_()
    runtime = torch.cuda.cudart()
    status = runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)
    if status != runtime.cudaError.success:
        raise StageError(
            f"{buffer.nbytes / 1e9:.2f} GB of host memory for layer inputs cannot be page-locked "
            f"({status}); free host memory or lower train.batch_size"
        )
    weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr())
    return buffer
