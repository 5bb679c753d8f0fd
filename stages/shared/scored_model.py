"""Loads a model for scoring or answering: on the device if it fits, else with streamed layers."""

import math
import re
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel

from stages.shared.card import card_budget
from stages.shared.fitting import Decoder, Fit, Scored, fit, scored, tightest
from stages.shared.host_memory import available_bytes
from stages.shared.model import load_base, load_streamed
from stages.shared.outputs import GB
from stages.shared.ranks import ALONE, World
from stages.shared.streaming import Streamer
from stages.shared.text_model import number_of
from stages.shared.weights import Weights


def model_sizes(
    folder: Path,
    longest: int,
    device: torch.device,
    adapter: Path | None = None,
    dense: bool = False,
) -> Scored:
    """Sizes of the model in `folder` and an adapter; rows have at most `longest` tokens.

    dense  in 16 bit, even if the folder has NF4
    """
    weights = Weights(folder)
    double_quant = any(f"{name}.nested_absmax" in weights.files for name in weights.nf4)
    beside = (adapter / "adapter_model.safetensors").stat().st_size if adapter else 0
    decoder = decoder_in(weights)
    on_gpu = device.type == "cuda"
    nf4 = bool(weights.nf4) and not dense
    return scored(decoder, nf4, double_quant, longest, beside, on_gpu)


def decoder_in(weights: Weights) -> Decoder:
    """The sizes of the decoder in a folder, from its files; the widest Linear counts as its MLP."""
    config = AutoConfig.from_pretrained(weights.folder, local_files_only=True).get_text_config()
    heads = config.num_attention_heads
    width = number_of(config, "head_dim") or config.hidden_size // heads
    matrices = [n for n, shape in weights.shapes.items() if len(shape) > 1]
    linears = weights.nf4 or [n for n in matrices if re.search(r"\.\d+\.", n)]
    sizes = [math.prod(weights.shapes[name]) for name in linears]
    return Decoder(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=max(max(weights.shapes[name]) for name in linears),
        keys=2 * (number_of(config, "num_key_value_heads") or heads) * width,
        linears=sum(sizes),
        largest=max(sizes),
        others=sum(math.prod(shape) for shape in weights.shapes.values()) - sum(sizes),
    )


def place_scored(
    stage: str, model: Scored, device: torch.device, world: World = ALONE, answers: float = 0.0
) -> tuple[Fit, float]:
    """(placement of `model`, remaining bytes of the device); prints a line if it is streamed."""
    # All ranks choose the same.
    budget = min(world.gather(card_budget() if device.type == "cuda" else available_bytes()))
    found = fit(model, budget, answers) or fit(model, budget) or tightest(model)
    if found.streamed and device.type == "cpu":
        # Unstreamed weights would be in float32.
        found = tightest(model)
    if found.streamed:
        whose = "the card" if device.type == "cuda" else "the machine's memory"
        print(
            f"{stage}: the model takes {model.weights / GB:.1f} GB and {budget / GB:.1f} GB of "
            f"{whose} are free: streaming {found.streamed} of {model.layers} layers, all rows "
            f"through one layer at a time; {found.needed / GB:.1f} GB predicted",
            flush=True,
        )
    return found, max(0.0, budget - found.needed)


def load_to_score(
    stage: str,
    folder: Path,
    sizes: Scored,
    device: torch.device,
    world: World = ALONE,
    answers: float = 0.0,
    passes: int = 1,
) -> tuple[PreTrainedModel, Streamer | None]:
    """The base in `folder`, and its streamer, if it is streamed.

    passes  over its weights: for more than one, a copy in locked memory is made if it fits
    """
    found, room = place_scored(stage, sizes, device, world, answers)
    if not found.streamed:
        return load_base(folder, device), None
    copies = passes > 1 and found.streamed * sizes.layer <= available_bytes()
    kind = "copy" if min(world.gather(copies)) else "ring"
    model, streamer = load_streamed(
        folder,
        device,
        found.streamed,
        "files" if device.type == "cpu" else kind,
        slots=found.slots,
        world=world,
    )
    streamer.room = room
    return model, streamer
