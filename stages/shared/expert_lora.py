"""LoRA on packed experts, in PEFT's own format.

PEFT adapts the stacked tensor [E, a, b] of a layer's experts as a parameter (target_parameters): it
wraps the module that owns the parameter and keeps A [E r, in], with the r rows of an expert
together, and B [out, r E], with the expert as the fastest index. Its forward pass adds B A to the
whole tensor, which packed experts do not have. So:

- While PEFT adds its wrappers, each packed tensor has a placeholder parameter of its shape without
  memory (`stand_ins`).
- Afterwards the wrappers only hold the factors. Each product of the packed experts adds
  scaling * B A x for every row's own expert (`use_factors`).

PEFT creates the factors, so the names and shapes in the adapter's file are its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from stages.shared.experts import PACKED, expert_stacks, packed_name
from stages.shared.packed import Groups, Packed, grouped_mm
from stages.shared.process import StageError

# Rows in a grouped product on a GPU must be aligned to 16 bytes.
ALIGNED = 8


def packed_tensors(model: nn.Module) -> dict[str, Packed]:
    """The packed experts of `model`, by the name of the tensor that each replaces."""
    return {
        f"{name}.{key.removesuffix(PACKED)}_proj": child
        for name, stack in expert_stacks(model).items()
        for key, child in stack.named_children()
        if isinstance(child, Packed)
    }


def target_parameters(model: nn.Module) -> list[str]:
    """PEFT's target_parameters for all experts of `model`."""
    return sorted({".".join(name.split(".")[-2:]) for name in packed_tensors(model)})


def wrapper_names(model: nn.Module) -> set[str]:
    """Names of the wrappers that PEFT adds: one for each tensor of a module, nested."""
    stacks = [name.rpartition(".")[0] for name in packed_tensors(model)]
    return {
        stack + ".base_layer" * depth for stack in stacks for depth in range(stacks.count(stack))
    }


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[None]:
    """Give each packed tensor of `model` a placeholder parameter of its shape for PEFT to find."""
    placed: list[tuple[nn.Module, str]] = []
    for name, packed in packed_tensors(model).items():
        owner, _, key = name.rpartition(".")
        stack = model.get_submodule(owner)
        device = next(packed.parameters()).device
        empty = torch.zeros((), device=device).expand(packed.shape)
        stack.register_parameter(key, nn.Parameter(empty, requires_grad=False))
        placed.append((stack, key))
    try:
        yield
    finally:
        for stack, key in placed:
            delattr(stack, key)


def use_factors(model: nn.Module) -> None:
    """Make the packed experts of `model` add the low-rank products of PEFT's wrappers.

    Raises StageError if `model` has LoRA on experts that are not packed.
    """
    for wrapper in model.modules():
        if isinstance(wrapper, ParamWrapper):
            stack = wrapper.get_base_layer()
            packed = getattr(stack, packed_name(wrapper.parameter_name), None)
            if packed is None:
                raise StageError(
                    f"the adapter has LoRA on {wrapper.parameter_name} of experts, which needs "
                    "quantize.type: nf4"
                )
            packed.added = Factors(wrapper)
            wrapper.forward = MethodType(_pass_on, wrapper)  # type: ignore[method-assign]


def _pass_on(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    return self.base_layer(*args, **kwargs)


class Factors:
    """Adds the low-rank part to one product of all experts. Not a module, or PyTorch would list
    the factors under a second name."""

    def __init__(self, wrapper: ParamWrapper):
        self.wrapper = wrapper

    def stacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A [E, r, in] and B [E, out, r], views of the parameters."""
        a, b = (
            half.get_parameter("default.weight")
            for half in (self.wrapper.lora_A, self.wrapper.lora_B)
        )
        experts = self.wrapper.num_experts
        return a.view(experts, -1, a.shape[1]), b.view(len(b), -1, experts).permute(2, 0, 1)

    def __call__(self, y: torch.Tensor, x: torch.Tensor, groups: Groups) -> torch.Tensor:
        """y [n, out] plus the low-rank product of rows x [n, in], sorted by expert."""
        if self.wrapper.disable_adapters:
            return y
        return y + _LowRank.apply(x, *self.stacked(), self.wrapper.scaling["default"], groups)


class _LowRank(torch.autograd.Function):
    """scaling * B A x for each row's expert, in autocast's dtype like the base's product."""

    @staticmethod
    def forward(ctx, x, a, b, scaling, groups):
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        ctx.dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        ctx.of_input, ctx.scaling, ctx.groups = x.dtype, scaling, groups
        x = x.to(ctx.dtype)
        inner = _each(x, a.to(ctx.dtype).mT, groups)
        ctx.save_for_backward(x, inner, a, b)
        return _each(inner, _scaled(b, scaling, ctx.dtype).mT, groups)

    @staticmethod
    def backward(ctx, dy):
        x, inner, a, b = ctx.saved_tensors
        dy = dy.to(ctx.dtype).contiguous()
        between = _each(dy, _scaled(b, ctx.scaling, ctx.dtype), ctx.groups)
        dx = _each(between, a.to(ctx.dtype), ctx.groups)
        da = _outer(between, x, ctx.groups).to(a.dtype)
        db = _outer(dy, inner, ctx.groups).to(b.dtype).mul_(ctx.scaling)
        return dx.to(ctx.of_input), da, db, None, None


def _scaled(b: torch.Tensor, scaling: float, dtype: torch.dtype) -> torch.Tensor:
    """scaling * B, rounded once and contiguous by expert."""
    return (scaling * b).to(dtype).contiguous()


def _each(x: torch.Tensor, weights: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Multiply each expert's rows of x [n, p] by its weight of [E, p, q]: [n, q]."""
    if _fused(x, *weights.shape[1:]):
        return grouped_mm(x, weights, groups.ends)
    y = x.new_empty(len(x), weights.shape[-1])
    for expert, low, high in groups.chosen:
        torch.mm(x[low:high], weights[expert], out=y[low:high])
    return y


def _outer(u: torch.Tensor, v: torch.Tensor, groups: Groups) -> torch.Tensor:
    """u^T v over each expert's rows, of u [n, p] and v [n, q]: [E, p, q], zero without rows."""
    if _fused(u, u.shape[1], v.shape[1]):
        found = grouped_mm(u.mT, v, groups.ends)
        # On some GPUs torch leaves these uninitialized (pytorch/pytorch#172439).
        empty = groups.ends.diff(prepend=groups.ends.new_zeros(1)) == 0
        return found.masked_fill_(empty[:, None, None], 0)
    found = u.new_zeros(len(groups.ends), u.shape[1], v.shape[1])
    for expert, low, high in groups.chosen:
        torch.mm(u[low:high].mT, v[low:high], out=found[expert])
    return found


def _fused(x: torch.Tensor, *widths: int) -> bool:
    aligned = all(width % ALIGNED == 0 for width in widths)
    return x.is_cuda and x.dtype == torch.bfloat16 and aligned
