"""The streamed merge of one tensor, and what a 16-bit type cannot hold of it.

Memory does not grow with the number of layers: at most one dequantized weight (16 bit) and some
row blocks are held at once. The result is that of PEFT's in-memory merge
(`merge_and_unload(safe_merge=False)`) of the base in the target type, bit for bit on one device.
"""

from collections.abc import Iterator

import torch

from stages.shared.adapter import Update
from stages.shared.stage import StageError
from stages.shared.weights import Weights

# float16 rounds what is below 2^-25 to zero. Normally distributed weights of width 0.02 lose one
# value in a million; a tensor that loses this share is too small for the type.
MAX_FLUSHED_SHARE = 0.01


def merged_rows(
    weights: Weights, name: str, update: Update | None, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the tensor `name` in row blocks: (values in `dtype`, the same before rounding).

    The order of operations is that of `weight.data += delta` in peft/tuners/lora/layer.py: the
    weight rounded to `dtype`, plus (B A) * scaling in float32, rounded once.
    """
    if update:
        a, b = update.factors(device)
    elif name not in weights.nf4:
        device = torch.device("cpu")  # Nothing to compute.
    for block, part in weights.rows(name, device):
        if update:
            exact = (b[block] @ a).mul_(update.scaling)
            exact += part.to(dtype)
        else:
            exact = part
        yield exact.to(dtype), exact


def check_rounding(name: str, blocks: Iterator, flushed: dict[str, int]) -> Iterator[torch.Tensor]:
    """Pass on the values of `merged_rows`, and count in `flushed` those that became zero.

    Raises StageError naming the tensor when a value is not finite, when one overflows, or when
    more than MAX_FLUSHED_SHARE became zero.
    """
    size = flushed[name] = 0
    for values, exact in blocks:
        kind = str(values.dtype).removeprefix("torch.")
        low, high = values.aminmax()
        if not (low.isfinite() and high.isfinite()):
            overflowed = int((values.isinf() & exact.isfinite()).sum())
            if not overflowed:
                raise StageError(f"{name}: NaN or infinite values in the base; fetch it again")
            raise StageError(
                f"{name}: {overflowed} values overflow {kind} (largest {exact.abs().max():.3g}); "
                "set merge.dtype: bfloat16"
            )
        size += values.numel()
        flushed[name] += int(exact.count_nonzero() - values.count_nonzero())
        yield values
    if flushed[name] > MAX_FLUSHED_SHARE * size:
        raise StageError(
            f"{name}: {flushed[name]} of {size} values become zero in {kind}; "
            "set merge.dtype: bfloat16"
        )
