"""Optimizer state in managed memory, which bitsandbytes' paged optimizers keep beside the GPU's."""

import torch


def paged_bytes(optimizer) -> int:
    """Bytes of the state of `optimizer` in managed memory, which torch's allocator does not count.

    torch's own optimizers and the CPU have none.
    """
    return sum(value.nbytes for _, _, value in _tensors(optimizer) if _is_paged(value))


def page_again(optimizer) -> None:
    """Move what a checkpoint brought back as plain GPU memory to where training would have it.

    bitsandbytes pages state when it makes it and not when it loads it (optim/optimizer.py): a
    resumed run would need a larger card than the undisturbed one.
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
