"""Loads a model for scoring or answering: on the device if it fits, else with streamed layers."""

import math
import re
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel

from stages.shared.adapter import rows_needed
from stages.shared.base_bytes import CHUNK_BYTES
from stages.shared.card import card_budget
from stages.shared.embeddings import copy_bytes
from stages.shared.experts import TENSORS, part_of
from stages.shared.fitting import Decoder, Fit, Scored, fit, scored, tightest
from stages.shared.host_memory import available_bytes
from stages.shared.model import load_base, load_streamed
from stages.shared.outputs import GB
from stages.shared.ranks import ALONE, World
from stages.shared.streaming import Streamer
from stages.shared.text_model import chosen_experts, head_size, number_of
from stages.shared.weights import Weights, model_weights


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
    weights = model_weights(folder)
    double_quant = any(f"{name}.nested_absmax" in weights.files for name in weights.nf4)
    beside: float = (adapter / "adapter_model.safetensors").stat().st_size if adapter else 0
    decoder = decoder_in(weights)
    on_gpu = device.type == "cuda"
    if adapter and (rows := rows_needed(adapter)):
        own = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
        beside += copy_bytes(max(rows, own.vocab_size), decoder.hidden, on_gpu)
    nf4 = bool(weights.nf4) and not dense
    if dense:
        decoder = replace(decoder, mxfp4=0)
    return scored(decoder, nf4, double_quant, longest, beside, on_gpu)


def decoder_in(weights: Weights) -> Decoder:
    """The sizes of the decoder in a folder, from its files; the widest Linear counts as its MLP."""
    config = AutoConfig.from_pretrained(weights.folder, local_files_only=True).get_text_config()
    heads = config.num_attention_heads
    width = head_size(config)
    shapes = weights.shapes
    matrices = [name for name, shape in shapes.items() if len(shape) > 1]
    packed = weights.nf4 and weights.nf4 | weights.mxfp4
    linears = sorted(packed) or [n for n in matrices if re.search(r"\.\d+\.", n)]
    size = {name: math.prod(shapes[name]) for name in linears}
    # By the model's tensor: a layer's experts are one, of which a chunk is dequantized.
    whole: dict[str, int] = {}
    for name in linears:
        tensor, *_ = part_of(name) or (name,)
        whole[tensor] = whole.get(tensor, 0) + size[name]
    experts = {name for name in linears if part_of(name) or name.endswith(TENSORS)}
    # Values between an expert's products: the down projection's size that is not the stream's.
    down = (shapes[name][-2:] for name in experts if "down_proj" in name)
    row = max((sum(shape) - config.hidden_size for shape in down), default=0)
    rows = chosen_experts(config) * max(row, config.hidden_size // 2) if experts else 0
    return Decoder(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=max([rows, *(max(shapes[n]) for n in linears if n not in experts)]),
        keys=2 * (number_of(config, "num_key_value_heads") or heads) * width,
        linears=sum(size.values()),
        largest=max(
            n if t in size and t not in experts else min(n, CHUNK_BYTES // 2)
            for t, n in whole.items()
        ),
        others=sum(math.prod(shape) for shape in shapes.values()) - sum(size.values()),
        mxfp4=sum(math.prod(shapes[name]) for name in weights.mxfp4),
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
