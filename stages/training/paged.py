"""Optimizer state of bitsandbytes' paged optimizers, in CUDA managed memory."""

import torch


def state_bytes(optimizer) -> tuple[int, int]:
    """Bytes of an optimizer's state in torch's allocator, and in managed memory (paged).

    Both are 0 before the first step, and for None.
    """
    tensors = [value for _, _, value in _tensors(optimizer)] if optimizer else []
    paged = sum(value.nbytes for value in tensors if _is_paged(value))
    return sum(value.nbytes for value in tensors) - paged, paged


def page_again(optimizer) -> None:
    """Move optimizer state loaded from a checkpoint back into managed memory.

    bitsandbytes pages state when it creates it, but not when it loads it (optim/optimizer.py), so
    a resumed run would need a larger card.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not getattr(inner, "is_paged", False):
        return
    for parameter, name, value in list(_tensors(inner)):
        if name in ("state1", "state2") and not _is_paged(value):
            buffer = inner.get_state_buffer(parameter, dtype=value.dtype)
            if _is_paged(buffer):
                inner.state[parameter][name] = buffer.copy_(value)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _tensors(optimizer):
    """(parameter, name, tensor) of the state."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                yield parameter, name, value


def _is_paged(value: torch.Tensor) -> bool:
    return getattr(value, "is_paged", False)
