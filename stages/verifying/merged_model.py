"""Loads the merged model with transformers alone, on the device or streamed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from stages.shared.experts import part_of
from stages.shared.fitting import Scored, tightest
from stages.shared.layer_sources import Make
from stages.shared.process import StageError
from stages.shared.ranks import ALONE, World
from stages.shared.scored_model import place_scored
from stages.shared.streaming import Streamer, stream_layers
from stages.shared.text_model import (
    find_backbone,
    is_multimodal,
    key_mapping,
    loading_report,
    read_config,
    without_tables,
)
from stages.shared.weights import Weights
from stages.verifying.folder_check import AGAIN


def place_merged(
    folder: Path,
    sizes: Scored,
    device: torch.device,
    world: World = ALONE,
    renamed: dict[str, str] | None = None,
    make: Make | None = None,
) -> tuple[PreTrainedModel, Streamer | None]:
    """The merged model, and its streamer if it does not fit on the device.

    renamed  as in load_merged
    make     (name, stored tensor) -> the tensor to compute with

    On the CPU its layers are always streamed: 16-bit products are slow there, and the whole model
    in float32 would take twice the memory.
    """
    if device.type == "cpu":
        found, room, dtype = tightest(sizes), 0.0, torch.float32
    else:
        found, room = place_scored("verify", sizes, device, world)
        dtype = None
    if not found.streamed:
        model = load_merged(folder, device, renamed)
        if make:
            for name, parameter in model.named_parameters():
                parameter.data.copy_(make(name, parameter.data))
        return model, None
    if any(part_of(name) for name in (renamed or {}).values()):
        # transformers would stack the experts of all layers in host memory.
        weights = Weights(folder, renamed)
        model, make = empty_merged(weights), stacked(weights, make)
    else:
        model = load_merged(folder, torch.device("cpu"), renamed)
    kind = "files" if make or device.type == "cpu" else "ring"
    streamer = stream_layers(
        model, device, found.streamed, kind, dtype=dtype, slots=found.slots, make=make
    )
    streamer.room = room
    return model, streamer


def empty_merged(weights: Weights) -> PreTrainedModel:
    """The language model of a merged folder. Its parameters have a shape and no memory: `stacked`
    gives their values. check_whole has compared their names and shapes."""
    config = read_config(weights.folder)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    for name, parameter in list(model.named_parameters()):
        owner, _, key = name.rpartition(".")
        empty = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        setattr(model.get_submodule(owner), key, torch.nn.Parameter(empty, requires_grad=False))
    model.tie_weights()
    loaded = weights.shapes.keys() & model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in loaded:
            buffer.data = weights.read(name)
    find_backbone(model)
    model.config.use_cache = False
    return model.eval()


def stacked(weights: Weights, make: Make | None) -> Make:
    """A Make that reads each tensor when it is needed, of its parts where the files have those of
    single experts; `make` gives another one instead, where it does not return what it is given."""

    def of(name: str, empty: torch.Tensor) -> torch.Tensor:
        # Memory that is not written takes none.
        whole = torch.empty(empty.shape, dtype=empty.dtype)
        if make and (other := make(name, whole)) is not whole:
            return other
        parts = weights.parts(name)
        if len(parts) == 1:
            return weights.read(parts[0])
        for place, part in zip(whole.view(len(parts), -1), parts, strict=True):
            place.copy_(weights.read(part).flatten())
        return whole

    return of


def check_whole(folder: Path) -> None:
    """Raise StageError if transformers misses a tensor of any tower."""
    _, report = loading_report(folder)
    for kind in ("missing_keys", "mismatched_keys"):
        if report[kind]:
            raise StageError(f"{folder}: {kind}: {sorted(map(str, report[kind]))[0]}; {AGAIN}")


def load_merged(folder: Path, device: torch.device, renamed: dict[str, str] | None = None):
    """Load the language model with transformers alone. Raises StageError for a missing or misshapen
    key.

    renamed  name in the files -> name in the language model, if they differ

    Unexpected keys are in the base too, as folder_check.check_headers has checked.
    """
    # Of a language model alone transformers knows the names itself.
    towers = is_multimodal(AutoConfig.from_pretrained(folder, local_files_only=True))
    # Typed as the model alone, which it is without output_loading_info.
    with without_tables():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=read_config(folder),
            key_mapping=key_mapping(renamed) if renamed and towers else None,
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
def watched_activations(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    """Yield a scalar with the largest |value| into or out of any layer with weights."""
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
