"""Chooses a stage's device, makes it deterministic, and measures its memory."""

import os
import resource
from typing import Any

import torch

from stages.shared.outputs import GB
from stages.shared.process import StageError


def pick_device() -> torch.device:
    """The first visible GPU, set to deterministic algorithms, or the CPU.

    Raises StageError below compute capability 8.0.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    _be_deterministic()
    capability = torch.cuda.get_device_capability(0)
    if capability < (8, 0):
        raise StageError(
            f"{torch.cuda.get_device_name(0)} has compute capability {capability[0]}."
            f"{capability[1]}, but 8.0 is needed; hide it with CUDA_VISIBLE_DEVICES= to use the CPU"
        )
    return torch.device("cuda", 0)


def _be_deterministic() -> None:
    """Let the same inputs give the same bytes on the same GPU model.

    Must be called before the first product, when cuBLAS allocates its workspace. With warn_only,
    the backward pass of attention would stay nondeterministic (ATen, attention_backward.cu).
    """
    # https://docs.nvidia.com/cuda/cublas/#results-reproducibility
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    # No stage reads uninitialized memory; filling it would cost a pass over each tensor.
    # (A property of the module's class, which mypy does not see.)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Has no deterministic backward pass.
    torch.backends.cuda.enable_cudnn_sdp(False)


def reset_peaks() -> None:
    """Start a new measurement of the GPU's peaks."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def memory_metrics(managed_bytes: int = 0) -> dict[str, float]:
    """Peaks of this process in GB: RAM, and on a GPU the allocator's.

    managed_bytes  of a paged optimizer (cudaMallocManaged), which torch's allocator does not count
    """
    metrics = {"peak_ram_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB}
    if torch.cuda.is_available():
        metrics["peak_vram_gb"] = (torch.cuda.max_memory_allocated() + managed_bytes) / GB
        metrics["peak_vram_reserved_gb"] = torch.cuda.max_memory_reserved() / GB
    return metrics


def memory_of_ranks(peaks: list[dict[str, float]]) -> dict[str, Any]:
    """The maximum of each peak over the ranks, in GB; with several ranks also a line with all."""
    found: dict[str, Any] = {key: max(peak[key] for peak in peaks) for key in peaks[0]}
    if len(peaks) > 1:
        for key in peaks[0]:
            found[f"{key}_by_rank"] = " ".join(f"{peak[key]:.6g}" for peak in peaks)
    return found
