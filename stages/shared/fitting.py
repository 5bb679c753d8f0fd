"""Does a model that is scored fit the card? If not, its layers are streamed.

A batch on its way through a layer takes, for each of its tokens, the stream and what RMSNorm makes
of it, 8H bytes, and what the MLP works with, 12I with an adapter; beside it are one dequantized
weight and the logits of LOGITS predictions with their copies in float32. An answer takes the KV
cache of its tokens besides. Without gradients nothing else is kept. Scored layer by layer
(stages/shared/by_layer.py), a model of any depth needs embeddings, head, the constants of NF4 and
one buffer of a layer.
"""

import math
from dataclasses import dataclass

from stages.shared.placement import CONTEXT, OFFLOADING_CONTEXT, SLOTS, WORKSPACES
from stages.shared.vram import NF4_BYTES

# Padded tokens in one forward pass, and logits that are in memory at once: with their copies in
# float32 they take 0.2 GB, less than training's own whatever the vocabulary.
TOKENS_PER_BATCH = 4096
LOGITS = 2**24
LOGIT_BYTES = 16


@dataclass(frozen=True)
class Decoder:
    """The numbers of a decoder that decide what scoring it takes. Parameters: `linears` of its
    layers, `largest` of one of those, `others` of all the rest. `keys` are the values that the KV
    cache of one layer has for a token."""

    layers: int
    hidden: int
    intermediate: int
    keys: int
    linears: int
    largest: int
    others: int


@dataclass(frozen=True)
class Scored:
    """A model with what scores it, in bytes. `layer` is what of a layer can be streamed;
    `dequantized` is one weight in 16 bit, a part of `working`; `token` and `cached` are those of a
    token at work and of one in the KV cache."""

    layers: int
    weights: float
    layer: float
    dequantized: float
    working: float
    token: float
    cached: float


@dataclass(frozen=True)
class Fit:
    """`streamed` layers take turns in `slots` buffers. `needed` bytes of the device."""

    streamed: int
    slots: int
    needed: float


def scored(
    decoder: Decoder,
    nf4: bool,
    double_quant: bool,
    longest: int,
    adapter: float,
    gpu: bool = True,
) -> Scored:
    """A base in NF4 or 16 bit, beside `adapter` bytes of one; rows have `longest` tokens at most.

    On the CPU what is not in NF4 becomes float32.
    """
    size = 2 if gpu else 4
    token = size / 2 * (12 * decoder.intermediate + 8 * decoder.hidden)
    dequantized = (size + NF4_BYTES[False] - 0.5) * decoder.largest if nf4 else 0.0
    each = NF4_BYTES[double_quant] if nf4 else size
    return Scored(
        layers=decoder.layers,
        weights=each * decoder.linears + size * decoder.others + adapter,
        # Of NF4 the codes; the constants stay.
        layer=(0.5 if nf4 else size) * decoder.linears / decoder.layers,
        dequantized=dequantized,
        working=max(TOKENS_PER_BATCH, longest) * token + dequantized + LOGIT_BYTES * LOGITS,
        token=token,
        cached=1.0 * size * decoder.layers * decoder.keys,
    )


def fit(model: Scored, budget: float, answers: float = 0.0, slots: int = SLOTS) -> Fit | None:
    """Where `model` lies in `budget` bytes: whole, or with the fewest streamed layers.

    answers  bytes of the answers that are written at once, when nothing is scored

    None when nothing fits.
    """
    rest = max(model.working, answers) + CONTEXT + WORKSPACES
    if model.weights + rest <= budget:
        return Fit(0, 0, model.weights + rest)
    rest += OFFLOADING_CONTEXT
    for count in range(min(slots, model.layers), 0, -1):
        over = model.weights + rest - budget
        streamed = count + max(1, math.ceil(over / model.layer))
        if streamed <= model.layers:
            return Fit(streamed, count, model.weights + rest - (streamed - count) * model.layer)
    return None


def tightest(model: Scored) -> Fit:
    """The placement that takes least."""
    needed = model.weights - (model.layers - 1) * model.layer + model.working
    return Fit(model.layers, 1, needed + CONTEXT + OFFLOADING_CONTEXT + WORKSPACES)
