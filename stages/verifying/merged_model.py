"""The merged model as transformers alone loads it, wherever there is room for its weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from stages.shared.fitting import tightest
from stages.shared.process import StageError
from stages.shared.ranks import ALONE, World
from stages.shared.scored_model import model_sizes, place_scored
from stages.shared.streaming import Make, Streamer, stream_layers
from stages.verifying.folder_check import AGAIN


def place_merged(
    folder: Path,
    longest: int,
    device: torch.device,
    world: World = ALONE,
    make: Make | None = None,
) -> tuple[PreTrainedModel, Streamer | None]:
    """The merged model where there is room for it, and what streams it if there is none.

    longest  tokens of the longest row, which are computed at once
    make     (name, stored tensor) gives the one to compute with

    On the CPU its layers are always streamed: 16-bit products are slow there, and in float32 all of
    it would take twice the room.
    """
    sizes = model_sizes(folder, longest, device)
    if device.type == "cpu":
        found, room, dtype = tightest(sizes), 0.0, torch.float32
    else:
        found, room = place_scored("verify", sizes, device, world)
        dtype = None
    if not found.streamed:
        model = load_merged(folder, device)
        if make:
            for name, parameter in model.named_parameters():
                parameter.data.copy_(make(name, parameter.data))
        return model, None
    model = load_merged(folder, torch.device("cpu"))
    kind = "files" if make or device.type == "cpu" else "ring"
    streamer = stream_layers(
        model, device, found.streamed, kind, dtype=dtype, slots=found.slots, make=make
    )
    streamer.room = room
    return model, streamer


def load_merged(folder: Path, device: torch.device):
    """Load with transformers alone. Raises StageError for a key missing or misshapen.

    One left over is in the base too, as folder_check.check_headers saw, and does no harm there.
    """
    # Typed as the model alone, which it is without output_loading_info.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", device_map={"": device}, output_loading_info=True
    )
    model, report = loaded
    for kind, keys in report.items():
        if keys and kind != "unexpected_keys":
            raise StageError(f"{folder}: {kind} when loading: {sorted(map(str, keys))[0]}; {AGAIN}")
    model.config.use_cache = False
    return model.eval()


@contextmanager
def watched_activations(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """Yield a scalar that holds the largest |value| into or out of any layer with weights."""
    largest = torch.zeros((), device=model.device)

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


def _layers(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    return [(n, m) for n, m in model.named_modules() if any(True for _ in m.parameters(False))]
