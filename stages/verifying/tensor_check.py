"""Checks that every merged tensor is the base plus the adapter, without using merge's code.

The expected values come from the model as loaded by transformers and PEFT, so that errors of merge
itself are found.
"""

from collections.abc import Callable
from typing import Any

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Params4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import TrainableTokensWrapper
from tqdm import tqdm

from stages.shared.embeddings import extended
from stages.shared.experts import packed_name, part_of
from stages.shared.packed import Packed
from stages.shared.process import StageError
from stages.shared.ranks import ALONE, World
from stages.shared.streaming import Streamer
from stages.shared.weights import Weights
from stages.verifying.folder_check import AGAIN

# Values of a tensor that are compared at once.
BLOCK_VALUES = 2**24


def check_tensors(
    merged: Weights,
    model: PeftModel,
    source: Weights,
    base: Weights,
    dtype: torch.dtype,
    device: torch.device,
    world: World = ALONE,
    streamer: Streamer | None = None,
) -> None:
    """Compare every merged tensor with what PEFT and bitsandbytes compute from the sources: of the
    language model `source`, of other towers `base`.

    The ranks of `world` share the tensors; `streamer` is given if the weights of `model` are
    streamed. Raises StageError naming tensors that differ by more than rounding.
    """
    modules = dict(model.get_base_model().named_modules())
    wrong = []
    names = merged.names[world.rank :: world.size]
    sizes = {name: torch.Size(merged.shapes[name]).numel() for name in names}
    total = sum(sizes.values()) * dtype.itemsize / 1e9
    with tqdm(total=total, unit="GB", desc="tensors", disable=None) as bar:
        for name in names:
            found = merged.read(name).to(device)
            module: Any = modules.get(name.rpartition(".")[0])
            updated = isinstance(module, LoraLayer) and name.endswith(".weight")
            if experts := packed_of(modules, name):
                stack, of_name = experts
                if streamer and (enter := streamer.entrance(next(stack.parameters()))):
                    enter()
                plain = of_name(stack).to(dtype)
            elif name in source.nf4:
                plain = module.base_layer.weight if updated else module.weight
                if streamer and (enter := streamer.entrance(plain)):
                    enter()
                if isinstance(plain, Params4bit):
                    plain = bnb.dequantize_4bit(plain.data, plain.quant_state)
                # As it is stored: load_base lets the CPU compute in float32.
                plain = plain.data.to(torch.bfloat16).to(dtype)
            else:
                # Of other towers, as it is.
                weights = source if name in source.shapes else base
                plain = weights.read(name)
                if isinstance(module, TrainableTokensWrapper):
                    plain = with_rows(plain, module)
                plain = plain.to(device, found.dtype)
            # In place, as PEFT merges: the sum is rounded once.
            delta = module.get_delta_weight("default") if updated else None
            expected = plain if delta is None else plain.clone().add_(delta)
            if not torch.equal(found, expected):
                fault = difference(found, expected, plain, module if updated else None)
                wrong += [f"{name} ({fault})"] if fault else []
            bar.update(sizes[name] * dtype.itemsize / 1e9)
    if wrong := sorted(fault for of_rank in world.gather(wrong) for fault in of_rank):
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise StageError(
            f"{merged.folder}: not the base plus the adapter: {', '.join(wrong[:3])}{more}; {AGAIN}"
        )


def packed_of(
    modules: dict[str, torch.nn.Module], name: str
) -> tuple[Packed, Callable[[Packed], torch.Tensor]] | None:
    """Of a tensor of experts, the module that has them packed, and how to have it in bfloat16."""
    tensor, expert, piece = part_of(name) or (name, None, 0)
    stack: Any = modules.get(packed_name(tensor))
    if not isinstance(stack, Packed):
        return None

    def found(stack: Packed) -> torch.Tensor:
        if expert is None:
            every = range(stack.shape[0])
            return torch.cat([stack.dense(e, e + 1, torch.bfloat16) for e in every])
        rows = stack.dense(expert, expert + 1, torch.bfloat16)[0]
        return rows.chunk(stack.pieces)[piece]

    return stack, found


def with_rows(plain: torch.Tensor, module: Any) -> torch.Tensor:
    """A matrix of the base with the rows that PEFT has for it."""
    rows = module.token_adapter
    ids = rows.token_indices["default"]
    plain = extended(plain, max(ids) + 1).float()
    values = rows.trainable_tokens_delta["default"].detach()
    return plain.index_copy(0, torch.tensor(ids), values.to(plain))


def rounding_slack(module: LoraLayer, rows: slice) -> torch.Tensor:
    """Bound on the difference of two float32 products B A * scaling, of some rows of [out, in].

    Devices sum the r terms in different orders; the error of each sum is at most r 2^-24 times the
    sum of the terms' magnitudes (Higham, Accuracy and Stability, section 3.1).
    """
    a, b = (half.get_parameter("default.weight") for half in (module.lora_A, module.lora_B))
    return (b[rows].abs() @ a.abs()).mul_(abs(module.scaling["default"]) * 2 * len(a) * 2**-24)


def difference(
    found: torch.Tensor, expected: torch.Tensor, plain: torch.Tensor, updated: LoraLayer | None
) -> str | None:
    """What is wrong with a merged tensor, or None if it is within one rounding of its type.

    updated  the module that has `plain` for its weight, and whose product was added

    Some rows at a time, since in float32 the largest tensor takes more memory than scoring.
    """
    info = torch.finfo(found.dtype)
    found, expected, plain = torch.atleast_1d(found, expected, plain)
    lost = count = 0
    step = max(1, BLOCK_VALUES * len(found) // found.numel()) if found.ndim > 1 else len(found)
    for start in range(0, len(found), step):
        rows = slice(start, start + step)
        own, exact = found[rows].float(), expected[rows].float()
        ulp = exact.abs().mul_(info.eps).clamp_(min=info.smallest_normal * info.eps)
        slack = rounding_slack(updated, rows) if updated else 0
        # Written so that NaN counts as a difference.
        count += int((~((own - exact).abs() <= ulp + slack)).sum())
        lost += int((~own.isfinite()).sum())
    if lost:
        return f"{lost} values are NaN or infinite"
    if count and torch.equal(found, plain):
        return "the adapter was not added"
    return f"{count} of {found.numel()} values differ" if count else None
