"""Dequantizes NF4 weights, and unpacks layers whose packed products would be wrong on a CPU."""

import copy
from typing import Any

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit

from stages.shared.base_bytes import BLOCK, NESTED_BLOCK


def dequantize(packed: torch.Tensor, state: bnb.QuantState) -> torch.Tensor:
    """The values of `packed` (uint8, two per byte), with the shape and type in `state`.

    Decodes rows of one block each, since on a CPU with AVX512 bitsandbytes (0.50.2) wrongly decodes
    rows whose length is a multiple of 16 but not of 64.
    """
    count, blocks = state.shape.numel(), -(-state.shape.numel() // BLOCK)
    packed = packed.reshape(-1)
    if missing := blocks * BLOCK // 2 - packed.numel():
        packed = torch.nn.functional.pad(packed, (0, missing))
    in_blocks = copy.copy(state)
    in_blocks.shape = torch.Size((blocks, BLOCK))
    return bnb.dequantize_4bit(packed.view(-1, 1), in_blocks).view(-1)[:count].view(state.shape)


def unpacked(packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values of `packed`, whole blocks, flat, by the scale of each block."""
    state = bnb.QuantState(
        scales.reshape(-1),
        shape=torch.Size((scales.numel(), BLOCK)),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
    )
    return dequantize(packed, state).view(-1)


def unnested(
    absmax: torch.Tensor, nested: torch.Tensor, offset: torch.Tensor, code: torch.Tensor
) -> torch.Tensor:
    """Scales [..., n] in float32, of double quantization, equal to bitsandbytes' to the bit.

    absmax [..., n] uint8, nested [..., n / NESTED_BLOCK, rounded up], offset [...]; `code` is
    bitsandbytes' create_dynamic_map.
    """
    each = nested.repeat_interleave(NESTED_BLOCK, -1)[..., : absmax.shape[-1]]
    return code[absmax.int()].mul_(each).add_(offset[..., None])


def unpack_odd_layers(model: torch.nn.Module) -> None:
    """Dequantize the layers of `model`, on the CPU, whose rows are not whole blocks.

    Their products would be wrong on some CPUs (see `dequantize`); done on every CPU alike.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit) and module.in_features % BLOCK:
            plain = torch.nn.Linear(module.in_features, module.out_features, device="meta")
            packed: Any = module.weight  # a Params4bit
            weight = dequantize(packed.data, packed.quant_state)
            plain.weight = torch.nn.Parameter(weight, requires_grad=False)
            plain.bias = module.bias
            model.set_submodule(name, plain)
