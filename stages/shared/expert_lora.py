"""LoRA on the experts of a mixture, in the form that PEFT itself loads and merges.

PEFT adapts a tensor [E, a, b] of a layer's experts as a bare parameter (its target_parameters). It
wraps the module that owns the parameter, and keeps A [E r, in], where the r rows of an expert are
together, and B [out, r E], where the expert changes fastest. In training it would add the product
B A to the whole tensor, which packed experts do not have. So:

- while PEFT places its wrappers, an empty parameter of the right shape stands where the packed
  experts are (`stand_ins`);
- afterwards the wrappers only hold the factors, and each product of the packed experts adds
  scaling * B A x of every row's own expert (`use_factors`).

Names and shapes in the adapter's file are PEFT's own, since PEFT made them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from stages.shared.experts import PACKED, expert_stacks
from stages.shared.packed import Groups, Packed, grouped_mm

# Rows of a grouped product on a GPU must begin at multiples of 16 bytes.
ALIGNED = 8


def packed_tensors(model: nn.Module) -> dict[str, Packed]:
    """By the name of the tensor that each stands for, the packed experts of `model`."""
    return {
        f"{name}.{key.removesuffix(PACKED)}_proj": child
        for name, stack in expert_stacks(model).items()
        for key, child in stack.named_children()
        if isinstance(child, Packed)
    }


def target_parameters(model: nn.Module) -> list[str]:
    """The tensors of all experts of `model`, in PEFT's words."""
    return sorted({".".join(name.split(".")[-2:]) for name in packed_tensors(model)})


def wrapper_names(model: nn.Module) -> set[str]:
    """What PEFT calls the modules that will hold the factors: one for each tensor of a stack, each
    around the one before."""
    stacks = [name.rpartition(".")[0] for name in packed_tensors(model)]
    return {
        stack + ".base_layer" * depth for stack in stacks for depth in range(stacks.count(stack))
    }


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[None]:
    """Within it the packed experts of `model` have a parameter each of the tensor's shape, without
    memory, for PEFT to find."""
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
    """Let the packed experts of `model` add what PEFT's wrappers hold for them."""
    for wrapper in model.modules():
        if isinstance(wrapper, ParamWrapper):
            stack = wrapper.get_base_layer()
            packed = getattr(stack, f"{wrapper.parameter_name.removesuffix('_proj')}{PACKED}")
            packed.added = Factors(wrapper)
            wrapper.forward = MethodType(_pass_on, wrapper)  # type: ignore[method-assign]


def _pass_on(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    return self.base_layer(*args, **kwargs)


class Factors:
    """What is added to one product of all experts. No module, so that the factors have one name."""

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
        """y [n, out] with the adapter's part for rows x [n, in], sorted by expert."""
        if self.wrapper.disable_adapters:
            return y
        return y + _LowRank.apply(x, *self.stacked(), self.wrapper.scaling["default"], groups)


class _LowRank(torch.autograd.Function):
    """scaling * B A x of each row's expert. In the type of the base's product, as autocast has
    it; sums over a row's terms are float32 within a product."""

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
    """scaling * B, rounded once, an expert's values together."""
    return (scaling * b).to(dtype).contiguous()


def _each(x: torch.Tensor, weights: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Rows x [n, p] of each expert times its weight [E, p, q]: [n, q]."""
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
        # torch leaves what it finds in memory there on some cards (pytorch/pytorch#172439).
        empty = groups.ends.diff(prepend=groups.ends.new_zeros(1)) == 0
        return found.masked_fill_(empty[:, None, None], 0)
    found = u.new_zeros(len(groups.ends), u.shape[1], v.shape[1])
    for expert, low, high in groups.chosen:
        torch.mm(u[low:high].mT, v[low:high], out=found[expert])
    return found


def _fused(x: torch.Tensor, *widths: int) -> bool:
    aligned = all(width % ALIGNED == 0 for width in widths)
    return x.is_cuda and x.dtype == torch.bfloat16 and aligned
