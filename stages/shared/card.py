"""How much GPU memory this process can use."""

from pathlib import Path

import torch

from stages.shared import placement
from stages.shared.outputs import GB, read_json

PLAN = Path("metrics/plan.json")
# Bytes of the card to leave free.
SPARE = 0.3e9
# Expected growth of the context, since kernels are loaded on first use.
CONTEXT_GROWTH = 0.25e9


def card_budget() -> float:
    """Bytes of the card that this process can use, including its context: the free memory, or
    plan.vram_limit_gb, to which the allocator is then limited."""
    free = torch.cuda.mem_get_info()[0]
    budget = free - CONTEXT_GROWTH - SPARE + placement.CONTEXT
    limit = read_json(PLAN).get("vram_limit_gb") if PLAN.exists() else None
    if limit is None or limit * GB >= budget:
        return budget
    hold_to(limit * GB)
    return limit * GB


def hold_to(limit: float) -> None:
    """Limit this process's allocator to `limit` bytes minus CUDA's own."""
    own = placement.CONTEXT + placement.OFFLOADING_CONTEXT
    share = max(0.0, limit - own) / torch.cuda.mem_get_info()[1]
    held = min(share, torch.cuda.get_per_process_memory_fraction())
    torch.cuda.set_per_process_memory_fraction(held)
