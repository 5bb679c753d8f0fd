"""Loading a base model and its adapter, the same way wherever a stage computes with them."""

import os
import resource
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from stages.shared.outputs import GB
from stages.shared.process import StageError

logging.disable_progress_bar()


def pick_device() -> torch.device:
    """The first visible GPU, or the CPU. Raises StageError below compute capability 8.0."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    capability = torch.cuda.get_device_capability(0)
    if capability < (8, 0):
        raise StageError(
            f"{torch.cuda.get_device_name(0)} has compute capability {capability[0]}."
            f"{capability[1]} and 8.0 is needed; hide it with CUDA_VISIBLE_DEVICES= to use the CPU"
        )
    return torch.device("cuda", 0)


def load_base(folder: Path, device: torch.device, attention: str | None = None) -> PreTrainedModel:
    """Load a base model (NF4 or 16 bit) in evaluation mode.

    `attention` is an attention implementation of transformers, None the best that it has itself.

    Everything that is not quantized, and the products of what is, computes in bfloat16 on a GPU
    and in float32 on the CPU, where bfloat16 is 10 to 30 times slower. A pre-quantized checkpoint
    ignores `dtype=`, so both are set after loading.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": device}, attn_implementation=attention
    )
    set_compute_dtype(model, dtype)
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
            module.weight.quant_state.dtype = dtype
            # bitsandbytes would repack the weights for AVX512-BF16 at the first forward pass
            # without gradients; merging and saving do not know that layout.
            module.support_avx512bf16_for_cpu = False
    for parameter in model.parameters():
        if parameter.is_floating_point() and not isinstance(parameter, Params4bit):
            parameter.data = parameter.data.to(dtype)


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put the adapter of `folder` onto `model`, frozen and in float32."""
    return PeftModel.from_pretrained(model, folder, is_trainable=False).eval()


def reset_peaks() -> None:
    """Begin a new measurement of the GPU's peaks."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def memory_metrics(managed_bytes: int = 0) -> dict[str, float]:
    """Peaks of this process in GB: RAM always, and on a GPU the allocator's.

    `managed_bytes` are those of a paged optimizer: cudaMallocManaged, which the allocator of
    torch does not count.
    """
    metrics = {"peak_ram_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB}
    if torch.cuda.is_available():
        metrics["peak_vram_gb"] = (torch.cuda.max_memory_allocated() + managed_bytes) / GB
        metrics["peak_vram_reserved_gb"] = torch.cuda.max_memory_reserved() / GB
    return metrics


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {len(os.sched_getaffinity(0))} cores"
