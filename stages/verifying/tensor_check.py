"""Checks that every merged tensor is the base plus the adapter, without using merge's code.

The expected values come from the model as loaded by transformers and PEFT, so that errors of merge
itself are found.
"""

from collections.abc import Callable, Iterator, Set
from functools import partial
from typing import Any

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Params4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import TrainableTokensWrapper
from tqdm import tqdm

from stages.shared.embeddings import extended
from stages.shared.expert_lora import Factors
from stages.shared.experts import TENSORS, packed_name, part_of
from stages.shared.packed import Packed
from stages.shared.process import StageError
from stages.shared.ranks import ALONE, World
from stages.shared.streaming import Streamer
from stages.shared.weights import Weights
from stages.verifying.folder_check import AGAIN

# Values compared at once: of a tensor in float32, and of experts.
BLOCK_VALUES, AT_ONCE = 2**24, 2**25


def check_tensors(
    merged: Weights,
    model: PeftModel,
    source: Weights,
    base: Weights,
    dtype: torch.dtype,
    device: torch.device,
    world: World = ALONE,
    streamer: Streamer | None = None,
    copied: Set[str] = frozenset(),
) -> None:
    """Compare every merged tensor with what PEFT and bitsandbytes compute from `source`, or, if it
    is `copied`, bit by bit with that of `base`.

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
            if name in copied:
                if not same_bits(merged.read(name), base.read(name)):
                    wrong.append(f"{name} (a copy that differs from the base)")
                bar.update(sizes[name] * dtype.itemsize / 1e9)
                continue
            stacked = len(merged.shapes[name]) == 3 and name.endswith(TENSORS)
            if packed_of(modules, name) or (stacked and name in source.shapes):
                faults = expert_faults(name, merged, modules, source, device, streamer)
                wrong += [f"{name} ({fault})" for fault in faults][:1]
                bar.update(sizes[name] * dtype.itemsize / 1e9)
                continue
            module = modules.get(name.rpartition(".")[0])
            if fault := tensor_fault(name, merged, module, source, dtype, device, streamer):
                wrong.append(f"{name} ({fault})")
            bar.update(sizes[name] * dtype.itemsize / 1e9)
    if wrong := sorted(fault for of_rank in world.gather(wrong) for fault in of_rank):
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise StageError(
            f"{merged.folder}: not the base plus the adapter: {', '.join(wrong[:3])}{more}; {AGAIN}"
        )


def tensor_fault(
    name: str,
    merged: Weights,
    module: Any,
    source: Weights,
    dtype: torch.dtype,
    device: torch.device,
    streamer: Streamer | None,
) -> str | None:
    """What is wrong with the merged tensor `name` of the base's `module`."""
    updated = isinstance(module, LoraLayer) and name.endswith(".weight")
    # First, since PEFT needs twice its memory, in float32, to compute it.
    delta = module.get_delta_weight("default") if updated else None
    found = merged.read(name).to(device)
    if name in source.nf4:
        plain = module.base_layer.weight if updated else module.weight
        if streamer and (enter := streamer.entrance(plain)):
            enter()
        if isinstance(plain, Params4bit):
            plain = bnb.dequantize_4bit(plain.data, plain.quant_state)
        # As it is stored: load_base lets the CPU compute in float32.
        plain = plain.data.to(torch.bfloat16).to(dtype)
    else:
        plain = source.read(name)
        if isinstance(module, TrainableTokensWrapper):
            plain = with_rows(plain, module)
        plain = plain.to(device, found.dtype)
    # In place, as PEFT merges: the sum is rounded once.
    expected = plain if delta is None else plain.clone().add_(delta)
    del delta
    if torch.equal(found, expected):
        return None
    return difference(found, expected, plain, partial(rounding_slack, module) if updated else None)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one type have the same bits, also those of NaN."""
    return torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (a, b)))


def expert_faults(
    name: str,
    merged: Weights,
    modules: dict[str, torch.nn.Module],
    source: Weights,
    device: torch.device,
    streamer: Streamer | None,
) -> Iterator[str]:
    """Differences in a tensor of one expert [out, in] or of all [E, a, b], compared in chunks."""
    read, shape = merged.reader(name, device), merged.shapes[name]
    whole = len(shape) == 3
    _, expert, piece = part_of(name) or (name, 0, 0)
    packed = packed_of(modules, name)
    if packed and streamer and (enter := streamer.entrance(next(packed.parameters()))):
        enter()
    experts = shape[0] if whole else 1
    step = max(1, AT_ONCE // torch.Size(shape[1:] if whole else shape).numel())
    for first in range(0, experts, step):
        last = min(first + step, experts)
        rows = slice(first, last) if whole else slice(0, shape[0])
        block = (first, last) if whole else (expert, expert + 1)
        found = read(rows)

        def own(values: torch.Tensor, pieces: int) -> torch.Tensor:
            return values if whole else values[0].chunk(pieces)[piece]

        if packed and (name in source.nf4 or name in source.mxfp4):
            plain = own(packed.dense(*block, torch.bfloat16), packed.pieces)
        else:
            plain = source.reader(name, device)(rows)
        plain, expected, slack = plain.to(found.dtype), plain.to(found.dtype), None
        if packed and packed.added:
            deltas = expert_delta(packed, *block, found.dtype)
            delta, bound = (own(values, packed.pieces) for values in deltas)
            expected, slack = plain + delta, bound.__getitem__
        if not torch.equal(found, expected):
            fault = difference(found, expected, plain, slack)
            if fault:
                yield fault


def expert_delta(
    packed: Packed, first: int, last: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """What PEFT's ParamWrapper adds to experts [first, last), in the weight's dtype, and a bound on
    the difference of another device's result."""
    assert isinstance(packed.added, Factors)  # Nothing else is added.
    wrapper: Any = packed.added.wrapper
    count = wrapper.num_experts
    a, b = (
        half.get_parameter("default.weight").detach() for half in (wrapper.lora_A, wrapper.lora_B)
    )
    a = a.reshape(count, -1, a.shape[-1])[first:last]
    b = b.reshape(len(b), -1, count)[..., first:last]
    form = "o r e, e r i -> e o i" if wrapper._did_swap_in_out_features else "o r e, e r i -> e i o"
    scaling = wrapper.scaling["default"]
    delta = (torch.einsum(form, b, a) * scaling).to(dtype)
    slack = torch.einsum(form, b.abs(), a.abs()) * (abs(scaling) * 2 * a.shape[1] * 2**-24)
    # The sum of another device may be rounded to a neighbouring value.
    return delta, slack.add_(delta.float().abs(), alpha=torch.finfo(dtype).eps)


def packed_of(modules: dict[str, torch.nn.Module], name: str) -> Packed | None:
    """The module with the packed experts of tensor `name`, if it is one."""
    tensor, *_ = part_of(name) or (name,)
    owner, _, key = packed_name(tensor).rpartition(".")
    stack: Any = modules.get(owner)
    if isinstance(stack, LoraLayer):
        # PEFT's wrappers are nested around it.
        stack = stack.get_base_layer()
    packed = getattr(stack, key, None)
    return packed if isinstance(packed, Packed) else None


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
    found: torch.Tensor,
    expected: torch.Tensor,
    plain: torch.Tensor,
    slack: Callable[[slice], torch.Tensor] | None = None,
) -> str | None:
    """What is wrong with a merged tensor, or None if it is within one rounding of its type.

    slack  gives the difference that is allowed in addition, of some rows

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
        # Written so that NaN counts as a difference.
        count += int((~((own - exact).abs() <= ulp + (slack(rows) if slack else 0))).sum())
        lost += int((~own.isfinite()).sum())
    if lost:
        return f"{lost} values are NaN or infinite"
    if count and torch.equal(found, plain):
        return "the adapter was not added"
    return f"{count} of {found.numel()} values differ" if count else None
