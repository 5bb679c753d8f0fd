"""The merged model as transformers alone loads it, wherever there is room for its weights.

Where a GPU has none, and on the CPU, they stay mapped from their files and layer after layer is
computed with.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from stages.shared.outputs import GB
from stages.shared.process import StageError
from stages.shared.scoring import TOKENS_PER_BATCH
from stages.shared.text_model import (
    find_backbone,
    key_mapping,
    loading_report,
    read_config,
    without_tables,
)
from stages.shared.weights import Weights
from stages.verifying.folder_check import AGAIN

# Beside the merged weights on a GPU: a batch's activations and logits (7B: 1.1e9 measured).
WORKING_BYTES = 1.5e9


def place_for(weights: Weights, longest: int, device: torch.device) -> torch.device:
    """Where a merged model waits: on the GPU if it has room for it, else in host memory.

    longest  tokens of the longest row, which are computed at once
    """
    if device.type == "cpu":
        return device
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    mine = torch.cuda.get_per_process_memory_fraction() * total - torch.cuda.memory_reserved()
    room = min(free, mine)
    needed = sum(2 * math.prod(shape) for shape in weights.shapes.values())
    needed += WORKING_BYTES * max(1, longest / TOKENS_PER_BATCH)
    if needed <= room:
        return device
    print(
        f"verify: the merged model takes {needed / GB:.1f} GB of the {room / GB:.1f} GB that are "
        "free on the GPU; its weights stay in host memory, and layer after layer visits",
        flush=True,
    )
    return torch.device("cpu")


def check_whole(folder: Path) -> None:
    """Raise StageError when transformers misses a tensor of any of the model's towers."""
    _, report = loading_report(folder)
    for kind in ("missing_keys", "mismatched_keys"):
        if report[kind]:
            raise StageError(f"{folder}: {kind}: {sorted(map(str, report[kind]))[0]}; {AGAIN}")


def load_merged(folder: Path, device: torch.device, renamed: dict[str, str] | None = None):
    """Load the language model with transformers alone. Raises StageError for a key missing or
    misshapen.

    renamed  names of the files' tensors in the language model, where they are others

    One left over is in the base too, as folder_check.check_headers saw, and does no harm there.
    """
    # Typed as the model alone, which it is without output_loading_info.
    with without_tables():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=read_config(folder),
            key_mapping=key_mapping(renamed) if renamed else None,
            dtype="auto",
            device_map={"": device},
            output_loading_info=True,
        )
    model, report = loaded
    for kind, keys in report.items():
        if keys and kind != "unexpected_keys":
            raise StageError(f"{folder}: {kind} when loading: {sorted(map(str, keys))[0]}; {AGAIN}")
    find_backbone(model)
    model.config.use_cache = False
    return model.eval()


@contextmanager
def watched_activations(model: torch.nn.Module, device: torch.device) -> Iterator[torch.Tensor]:
    """Yield a scalar that holds the largest |value| into or out of any layer with weights."""
    largest = torch.zeros((), device=device)

    def watch(_module, inputs, output):
        for value in (*inputs, output):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                low, high = value.aminmax()
                torch.maximum(largest, torch.maximum(-low, high).float(), out=largest)

    handles = [m.register_forward_hook(watch) for _, m in _layers(model)]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def streamed_layers(
    model: PreTrainedModel,
    device: torch.device,
    weight_of: Callable[[str, torch.Tensor], torch.Tensor],
) -> Iterator[None]:
    """Compute on `device` with a 16-bit model in host memory, one layer's weights at a time.

    Before a layer runs, each of its weights becomes weight_of(name, stored) on the device;
    afterwards it is the stored one again, which the system keeps mapped from its file. On the CPU
    it computes in float32: 16-bit products are slow there.
    """
    handles = []
    stored: dict[tuple[torch.nn.Module, str], torch.Tensor] = {}
    dtype = torch.float32 if device.type == "cpu" else model.dtype
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    head = model.get_output_embeddings()

    def leave(module, *_):
        for key, parameter in module.named_parameters(recurse=False):
            parameter.data = stored.pop((module, key))

    for prefix, module in _layers(model):

        def enter(module, _inputs, prefix=prefix):
            for key, parameter in module.named_parameters(recurse=False):
                stored[module, key] = parameter.data
                parameter.data = weight_of(f"{prefix}.{key}", parameter.data).to(device, dtype)

        if module is head:
            # It runs for every chunk of logits: it enters once.
            enter(module, None)
            continue
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        leave(head)
        for handle in handles:
            handle.remove()


def _layers(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    return [(n, m) for n, m in model.named_modules() if any(True for _ in m.parameters(False))]
