"""MXFP4 as gpt-oss comes in it: 32 values of four bits and the power of two that scales them.

The format: OCP Microscaling Formats (MX) v1.0, E2M1 elements with E8M0 scales.
"""

import math
from functools import cache

import torch

# What the codes 0 to 15 stand for.
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = (*_POSITIVE, *(-value for value in _POSITIVE))
GROUP = 32
_BIAS = 127
# The key of config.json in models/quantized by which it is said that experts are in MXFP4.
STORAGE = "expert_storage"


# Values that are looked up at once, where few calls matter more than memory.
_AT_ONCE = 2**26


def experts_at_once(values: int) -> int:
    """Of so many values each."""
    return max(1, _AT_ONCE // values)


def lookup_bytes(values: int) -> float:
    """What looking up bfloat16 `values` takes beside them: an index of 4 bytes for each two, and
    the values before they are where they belong."""
    return 4.0 * min(values, _AT_ONCE)


def decoded(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values [..., 32 n] of uint8 `blocks` [..., n, 16], the first of two in the low bits, and
    uint8 `scales` [..., n]. Exact in bfloat16 and float32."""
    pairs, powers = _tables(dtype, blocks.device)
    found = pairs[blocks.int()].flatten(-2)
    found *= powers[scales.int()].unsqueeze(-1)
    return found.flatten(-2)


@cache
def _tables(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The two values of each byte of blocks [256, 2], and the power of two of each scale [256]."""
    pairs = [(VALUES[byte & 15], VALUES[byte >> 4]) for byte in range(256)]
    powers = [2.0 ** (scale - _BIAS) for scale in range(255)] + [math.nan]
    return torch.tensor(pairs, dtype=dtype, device=device), torch.tensor(
        powers, dtype=dtype, device=device
    )
