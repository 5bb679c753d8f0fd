"""Loading a base model and its adapter, the same way wherever a stage computes with them."""

from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from stages.shared.nf4 import unpack_odd_layers
from stages.shared.process import StageError
from stages.shared.text_model import find_backbone

logging.disable_progress_bar()


def load_base(
    folder: Path,
    device: torch.device,
    attention: str | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Load a base model (NF4 or 16 bit) in evaluation mode.

    attention  an attention implementation of transformers, None the best that it has itself
    dtype      what it computes in, None for what `device` is fast in

    Everything that is not quantized, and the products of what is, computes in bfloat16 on a GPU
    and in float32 on the CPU, where bfloat16 is 10 to 30 times slower. A pre-quantized checkpoint
    ignores `dtype=`, so both are set after loading.
    """
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": device}, attn_implementation=attention
    )
    find_backbone(model)
    set_compute_dtype(model, dtype)
    # What is loaded in bfloat16 on the CPU is on its way to a GPU.
    if device.type == "cpu" and dtype == torch.float32:
        unpack_odd_layers(model)
    model.config.use_cache = False
    return model.eval()


def set_compute_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast what is not quantized to `dtype` and let 4-bit products compute in it."""
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
    for parameter in model.parameters():
        if parameter.is_floating_point() and not isinstance(parameter, Params4bit):
            parameter.data = parameter.data.to(dtype)


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put the adapter of `folder` onto `model`, frozen and in float32.

    Raises StageError where PEFT refuses its configuration.
    """
    try:
        return PeftModel.from_pretrained(model, folder, is_trainable=False).eval()
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error)[:500].split())
        raise StageError(f"{folder}: PEFT does not load it: {reason}") from None
