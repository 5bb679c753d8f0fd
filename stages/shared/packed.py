"""Experts stored in 4 bit and dequantized a few at a time where they compute.

transformers keeps all experts of a layer in two three-dimensional tensors, which quantizers of
Linears do not handle. Here a module replaces each such tensor. It holds packed bytes and constants
and returns experts [first, last) dequantized (`dense`). Each storage format is a subclass of Packed
(stages/shared/packed_storages.py).

The product of tokens and experts saves no weight for the backward pass, which dequantizes again. So
no dense expert outlives its product. Experts are dequantized in chunks of at most CHUNK_BYTES,
which bounds memory independently of the size of a layer.

The results of a token's experts are summed in the order in which the router chose them, without
atomic additions, so that results are deterministic on every device.
"""

import math
from collections.abc import Callable
from functools import cached_property
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from stages.shared.base_bytes import CHUNK_BYTES
from stages.shared.experts import OWN_CODE, PACKED, expert_stacks, packed_name

# Name of the forward pass below in transformers' registry.
IMPLEMENTATION = "packed"
# transformers' own grouped_mm under another name, since generate() replaces it by that name.
PINNED = "pinned"


class Groups:
    """Bounds of rows sorted by expert. `ends` [E] int32: the end of each expert's rows."""

    def __init__(self, ends: torch.Tensor):
        self.ends = ends.to(torch.int32)

    @cached_property
    def bounds(self) -> list[int]:
        """[E + 1]: the first row of each expert and the number of rows. Synchronizes the device."""
        return [0, *self.ends.tolist()]

    @property
    def chosen(self) -> list[tuple[int, int, int]]:
        """(expert, first row, end) of the experts that have rows. Synchronizes the device."""
        ranges = zip(range(len(self.ends)), self.bounds, self.bounds[1:], strict=False)
        return [each for each in ranges if each[1] < each[2]]


class Packed(nn.Module):
    """The weights of all experts of a layer for one product, in some storage format.

    shape       [E, a, b] of the dense tensor in transformers
    transposed  whether that is [E, in, out] instead of [E, out, in]

    Called with rows [n, in] sorted by expert and their Groups, it returns [n, out].
    """

    transposed = False
    # Number of checkpoint tensors per expert: 2 if gate and up are separate.
    pieces = 1
    # (result, rows, groups) -> the result plus that of an adapter (stages/shared/expert_lora.py).
    added: Callable[[torch.Tensor, torch.Tensor, Groups], torch.Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        raise NotImplementedError

    def dense(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        """Experts [first, last), dequantized: [last - first, a, b]."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor, groups: Groups) -> torch.Tensor:
        y = _Product.apply(x, self, groups)
        return self.added(y, x, groups) if self.added else y


class _Product(torch.autograd.Function):
    """Multiplies each row by its expert's weight. Saves no tensor for the backward pass."""

    @staticmethod
    def forward(ctx, x, packed, groups):
        ctx.packed, ctx.groups, ctx.of_input = packed, groups, x.dtype
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        ctx.dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        return _grouped(x.to(ctx.dtype), packed, groups, turned=not packed.transposed)

    @staticmethod
    def backward(ctx, dy):
        dy = dy.to(ctx.dtype).contiguous()
        dx = _grouped(dy, ctx.packed, ctx.groups, turned=ctx.packed.transposed)
        return dx.to(ctx.of_input), None, None


def _grouped(x: torch.Tensor, packed: Packed, groups: Groups, turned: bool) -> torch.Tensor:
    """Multiply each expert's rows of x by its weight [a, b], or if `turned` by the transpose."""
    experts, a, b = packed.shape
    fused = x.is_cuda and x.dtype == torch.bfloat16
    chunk = max(1, CHUNK_BYTES // (a * b * x.dtype.itemsize))
    if fused and chunk >= experts:
        weights = packed.dense(0, experts, x.dtype)
        return grouped_mm(x, weights.mT if turned else weights, groups.ends)
    # Every row belongs to an expert, so all of y is written.
    y, bounds = x.new_empty(len(x), a if turned else b), groups.bounds
    for first in range(0, experts, chunk):
        last = min(first + chunk, experts)
        start, end = bounds[first], bounds[last]
        if start == end:
            continue
        weights = packed.dense(first, last, x.dtype)
        weights = weights.mT if turned else weights
        if fused:
            y[start:end] = grouped_mm(x[start:end], weights, groups.ends[first:last] - start)
            continue
        for weight, low, high in zip(weights, bounds[first:], bounds[first + 1 :], strict=False):
            if low < high:
                torch.mm(x[low:high], weight, out=y[low:high])
    return y


def grouped_mm(x: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return nn.functional.grouped_mm(x, weights, offs=ends)


class _Sort(torch.autograd.Function):
    """Repeats rows [n, width] once per chosen expert and sorts them by expert."""

    @staticmethod
    def forward(ctx, x, order, chosen):
        # Saved, not kept as an attribute, which would outlive the first of two checkpointed passes.
        ctx.save_for_backward(order)
        ctx.chosen = chosen
        return x[order // chosen]

    @staticmethod
    def backward(ctx, dy):
        return _back(dy, ctx.saved_tensors[0], ctx.chosen), None, None


class _Sum(torch.autograd.Function):
    """The inverse of _Sort: sums the rows of each token."""

    @staticmethod
    def forward(ctx, y, order, chosen):
        ctx.save_for_backward(order)
        ctx.chosen = chosen
        return _back(y, order, chosen)

    @staticmethod
    def backward(ctx, dx):
        return dx[ctx.saved_tensors[0] // ctx.chosen], None, None


def _back(y: torch.Tensor, order: torch.Tensor, chosen: int) -> torch.Tensor:
    placed = torch.empty_like(y)
    placed[order] = y
    return placed.view(-1, chosen, y.shape[-1]).sum(1)


def experts_forward(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """transformers' forward pass of experts, for a module `self` whose experts are packed.

    hidden_states [n, H]; top_k_index and top_k_weights [n, k]
    """
    chosen = top_k_index.shape[-1]
    ids, order = top_k_index.flatten().sort(stable=True)
    every = torch.arange(self.num_experts, device=ids.device)
    groups = Groups(torch.searchsorted(ids, every, right=True))
    gated, biased = self.has_gate, self.has_bias
    first = f"{'gate_' * gated}up"
    y = getattr(self, first + PACKED)(_Sort.apply(hidden_states, order, chosen), groups)
    if biased:
        y = y + getattr(self, f"{first}_proj_bias")[ids]
    y = self._apply_gate(y) if gated else self.act_fn(y)
    y = self.down_packed(y, groups)
    if biased:
        y = y + self.down_proj_bias[ids]
    if getattr(self, "has_post_expert_norm", False):
        y = self.post_expert_norm(y)
    y = y * top_k_weights.flatten()[order, None]
    return _Sum.apply(y, order, chosen).to(hidden_states.dtype)


def llama4_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """That of Llama4TextExperts, whose input has every token once per expert, sorted by expert."""
    rows = len(hidden_states) // self.num_experts
    every = torch.arange(1, self.num_experts + 1, device=hidden_states.device)
    groups = Groups(rows * every)
    gate, up = self.gate_up_packed(hidden_states, groups).chunk(2, dim=-1)
    return self.down_packed(up * self.act_fn(gate), groups)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
ALL_EXPERTS_FUNCTIONS.register(PINNED, ALL_EXPERTS_FUNCTIONS["grouped_mm"])


def put_packed(model: PreTrainedModel, name: str, packed: Packed) -> None:
    """Replace the parameter `name` of `model` by `packed`. Raises ValueError if their shapes
    differ."""
    owner, _, key = name.rpartition(".")
    experts = model.get_submodule(owner)
    if tuple(experts.get_parameter(key).shape) != packed.shape:
        expected = tuple(experts.get_parameter(key).shape)
        raise ValueError(f"{name} is {packed.shape} and must be {expected}")
    packed.transposed = getattr(experts, "is_transposed", type(experts).__name__ in OWN_CODE)
    delattr(experts, key)
    experts.add_module(packed_name(key), packed)


def parameters_of(model: Any) -> tuple[int, int]:
    """(trained, all) parameters of a PEFT model; PEFT itself counts packed experts as bytes."""
    trained, all_of_them = model.get_nb_trainable_parameters()
    packed = [module for module in model.modules() if isinstance(module, Packed)]
    stored = sum(parameter.numel() for module in packed for parameter in module.parameters(False))
    return trained, all_of_them + sum(math.prod(module.shape) for module in packed) - stored


def pin_experts(model: PreTrainedModel) -> None:
    """Use one implementation of 16-bit experts throughout: on a GPU, generate() of transformers
    would switch to another one, so that answers and scores could differ."""
    if getattr(model.config, "_experts_implementation", None) == "grouped_mm":
        model.set_experts_implementation(PINNED)


def compute_packed(model: PreTrainedModel) -> None:
    """Make the experts of `model`, which are all packed, use the forward passes above."""
    stacks = expert_stacks(model).values()
    for module in stacks:
        if type(module).__name__ in OWN_CODE:
            module.forward = MethodType(llama4_forward, module)
    if any(type(module).__name__ not in OWN_CODE for module in stacks):
        model.set_experts_implementation(IMPLEMENTATION)
