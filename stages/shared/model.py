"""Loads a base model and its adapter, in the same way for all stages."""

import socket
from functools import partial
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from stages.shared.adapted import check_adapted, targets_as_written
from stages.shared.adapter import factor_shapes
from stages.shared.expert_lora import stand_ins, use_factors
from stages.shared.experts import expert_stacks
from stages.shared.nf4 import unpack_odd_layers
from stages.shared.packed import pin_experts
from stages.shared.packed_model import holds_packed, load_packed
from stages.shared.placement import SLOTS
from stages.shared.process import StageError
from stages.shared.ranks import ALONE, World
from stages.shared.streaming import Streamer, stream_layers
from stages.shared.text_model import find_backbone, kept_in_float32

logging.disable_progress_bar()


def load_base(
    folder: Path,
    device: torch.device,
    attention: str | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Load a base model (NF4 or 16 bit) in evaluation mode.

    attention  an attention implementation of transformers; None for transformers' choice
    dtype      the compute type; None for the fast one of `device`

    Unquantized weights and 4-bit products compute in bfloat16 on a GPU and in float32 on the CPU,
    where bfloat16 is 10 to 30 times slower. A pre-quantized checkpoint ignores `dtype=`, so both
    are set after loading.
    """
    dtype = dtype or computed_in(device)
    model = _stored(folder, device, attention, dtype)
    find_backbone(model)
    set_compute_dtype(model, dtype)
    # A model in bfloat16 on the CPU is about to be moved to a GPU.
    if device.type == "cpu" and dtype == torch.float32:
        unpack_odd_layers(model)
    model.config.use_cache = False
    return model.eval()


def load_streamed(
    folder: Path,
    device: torch.device,
    count: int,
    kind: str = "copy",
    attention: str | None = None,
    slots: int = SLOTS,
    world: World = ALONE,
) -> tuple[PreTrainedModel, Streamer]:
    """The base as from `load_base`, with `count` layers streamed to `device`, and its streamer.

    kind  as in stream_layers; the ranks of a machine share a copy, which the first one makes
    """
    # Mapped from its files: nothing is read before it is copied to where it belongs.
    model = _stored(folder, torch.device("cpu"), attention, "auto")
    find_backbone(model)
    dtype = computed_in(device)
    let_4_bit_compute_in(model, dtype)
    if device.type == "cpu":
        unpack_odd_layers(model)
    model.config.use_cache = False
    stream = partial(stream_layers, model.eval(), device, count, dtype=dtype, slots=slots)
    if kind != "copy":
        return model, stream(kind=kind)
    machines = world.gather(socket.gethostname())
    maker = machines.index(machines[world.rank])
    if maker == world.rank:
        streamer = stream()
        world.gather(streamer.source.path)
        return model, streamer
    return model, stream(path=world.gather(None)[maker])


def _stored(
    folder: Path, device: torch.device, attention: str | None, dtype: torch.dtype | str
) -> PreTrainedModel:
    if holds_packed(folder):
        return load_packed(folder, device, attention)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": device}, attn_implementation=attention
    )
    if expert_stacks(model):
        pin_experts(model)
    return model


def computed_in(device: torch.device) -> torch.dtype:
    """The fast compute type of `device`."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def set_compute_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast what is not quantized to `dtype`, but for what stays in float32, and let 4-bit products
    compute in it."""
    let_4_bit_compute_in(model, dtype)
    kept = kept_in_float32(model)
    for name, parameter in model.named_parameters():
        floats = parameter.is_floating_point() and not isinstance(parameter, Params4bit)
        if name in kept:
            parameter.data = parameter.data.float()
        elif floats:
            parameter.data = parameter.data.to(dtype)


def let_4_bit_compute_in(model: torch.nn.Module, dtype: torch.dtype) -> None:
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
            module.compute_type_is_set = True
            # Weights are dequantized into this dtype; on the CPU the forward kernel never rounds
            # them to bfloat16, so the backward pass must not either.
            module.weight.quant_state.dtype = dtype  # type: ignore[attr-defined]  # a Params4bit
            # bitsandbytes would repack the weights for AVX512-BF16 at the first forward pass
            # without gradients; merging and saving do not know that layout.
            module.support_avx512bf16_for_cpu = False


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Load the adapter in `folder` onto `model`, frozen and in float32.

    Raises StageError where PEFT refuses its configuration, or would leave a part of it out.
    """
    try:
        with targets_as_written(), stand_ins(model):
            adapted = PeftModel.from_pretrained(model, folder, is_trainable=False).eval()
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error)[:500].split())
        raise StageError(f"{folder}: PEFT does not load it: {reason}") from None
    factors, _ = factor_shapes(folder)
    asked = {module for module, _ in factors}
    check_adapted(adapted, asked, str(folder), "name its modules in full in adapter_config.json")
    use_factors(adapted)
    return adapted
