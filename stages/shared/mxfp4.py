"""MXFP4, the format of gpt-oss: blocks of 32 four-bit values with a power of two as scale.

The format: OCP Microscaling Formats (MX) v1.0, E2M1 elements with E8M0 scales.
"""

import math
from functools import cache

import torch

# The values of the codes 0 to 15.
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = (*_POSITIVE, *(-value for value in _POSITIVE))
GROUP = 32
_BIAS = 127
# Key of models/quantized/config.json that says that the experts are in MXFP4.
STORAGE = "expert_storage"

# Values looked up at once: large, so that there are few calls.
_AT_ONCE = 2**26


def experts_at_once(values: int) -> int:
    """Number of experts with so many `values` each to decode at once."""
    return max(1, _AT_ONCE // values)


def lookup_bytes(values: int) -> float:
    """Memory for decoding bfloat16 `values` besides the result: an index of 4 bytes for every two,
    and a temporary copy of the values."""
    return 4.0 * min(values, _AT_ONCE)


def decoded(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Decode uint8 `blocks` [..., n, 16] with uint8 `scales` [..., n] to values [..., 32 n].

    The low four bits of a byte come first. Exact in bfloat16 and float32.
    """
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
