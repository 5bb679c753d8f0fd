"""How much of a GPU this process can have."""

from pathlib import Path

import torch

from stages.shared import placement
from stages.shared.outputs import GB, read_json

PLAN = Path("metrics/plan.json")
# Of the card, beside what is predicted.
SPARE = 0.3e9
# What the context still grows by: kernels are loaded when they first run.
CONTEXT_GROWTH = 0.25e9


def card_budget() -> float:
    """Bytes that this process can have of the card, its context included: what is free, or
    plan.vram_limit_gb, to which the allocator is then held."""
    free = torch.cuda.mem_get_info()[0]
    budget = free - CONTEXT_GROWTH - SPARE + placement.CONTEXT
    limit = read_json(PLAN).get("vram_limit_gb") if PLAN.exists() else None
    if limit is None or limit * GB >= budget:
        return budget
    hold_to(limit * GB)
    return limit * GB


def hold_to(limit: float) -> None:
    """Let this process's allocator take no more of the card than `limit` bytes, less CUDA's own."""
    own = placement.CONTEXT + placement.OFFLOADING_CONTEXT
    share = max(0.0, limit - own) / torch.cuda.mem_get_info()[1]
    held = min(share, torch.cuda.get_per_process_memory_fraction())
    torch.cuda.set_per_process_memory_fraction(held)
