"""Does a model fit on the card for scoring? If not, its layers are streamed.

In a layer, each token of a batch takes 8H bytes for the residual stream and RMSNorm, and 12I for
the MLP with an adapter. In addition there are one dequantized weight and the logits of LOGITS
predictions with float32 copies, for answers the KV cache, and with streamed layers two hidden
states that move between the device and host memory. Without gradients nothing else is kept. Scored
layer by layer (stages/shared/by_layer.py), a model of any depth needs embeddings, head, NF4
constants and one layer buffer.
"""

import math
from dataclasses import dataclass

from stages.shared.base_bytes import MXFP4_BYTES, NF4_BYTES
from stages.shared.mxfp4 import lookup_bytes
from stages.shared.placement import CONTEXT, OFFLOADING_CONTEXT, SLOTS, WORKSPACES

# Padded tokens in one forward pass, and logits in memory at once: 0.2 GB with their float32 copies,
# less than in training, for any vocabulary.
TOKENS_PER_BATCH = 4096
LOGITS = 2**24
LOGIT_BYTES = 16


@dataclass(frozen=True)
class Decoder:
    """The sizes of a decoder that determine the memory of scoring. Parameter counts: `linears` of
    its layers, `largest` of the largest of those, `others` of the rest; `mxfp4` of those of
    `linears` that are experts in MXFP4. `keys`: values per token in the KV cache of one layer."""

    layers: int
    hidden: int
    intermediate: int
    keys: int
    linears: int
    largest: int
    others: int
    mxfp4: int = 0


@dataclass(frozen=True)
class Scored:
    """A model in scoring, in bytes. `layer`: the streamable part of a layer; `dequantized`: one
    weight in 16 bit, a part of `working`; `token` and `cached`: of a token being computed and of
    one in the KV cache; `moving`: two hidden states of a batch, which move between the device and
    host memory while another one is computed."""

    layers: int
    weights: float
    layer: float
    dequantized: float
    working: float
    token: float
    cached: float
    moving: float = 0.0


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
    """Sizes of a base in NF4 or 16 bit with an adapter of `adapter` bytes and rows of at most
    `longest` tokens.

    On the CPU everything but NF4 is float32.
    """
    size = 2 if gpu else 4
    token = size / 2 * (12 * decoder.intermediate + 8 * decoder.hidden)
    dequantized = (size + NF4_BYTES[False] - 0.5) * decoder.largest if nf4 else 0.0
    if decoder.mxfp4:
        dequantized = size * decoder.largest + lookup_bytes(decoder.largest)
    each = NF4_BYTES[double_quant] if nf4 else size
    stored = each * (decoder.linears - decoder.mxfp4) + MXFP4_BYTES * decoder.mxfp4
    # The codes of NF4; the constants stay.
    sent = (0.5 if nf4 else size) * (decoder.linears - decoder.mxfp4) + 0.5 * decoder.mxfp4
    return Scored(
        layers=decoder.layers,
        weights=stored + size * decoder.others + adapter,
        layer=sent / decoder.layers,
        dequantized=dequantized,
        working=max(TOKENS_PER_BATCH, longest) * token + dequantized + LOGIT_BYTES * LOGITS,
        token=token,
        cached=1.0 * size * decoder.layers * decoder.keys,
        moving=2.0 * size * decoder.hidden * max(TOKENS_PER_BATCH, longest) if gpu else 0.0,
    )


def fit(model: Scored, budget: float, answers: float = 0.0, slots: int = SLOTS) -> Fit | None:
    """How `model` fits in `budget` bytes: whole, or with as few streamed layers as possible.

    answers  bytes of a batch of answers, which are not generated while scoring

    None if nothing fits.
    """
    rest = max(model.working, answers) + CONTEXT + WORKSPACES
    if model.weights + rest <= budget:
        return Fit(0, 0, model.weights + rest)
    rest += OFFLOADING_CONTEXT
    for count in range(min(slots, model.layers), 0, -1):
        # More than one buffer only beside room for hidden states that move, which gain more.
        moving = model.moving if count > 1 else 0.0
        over = model.weights + rest + moving - budget
        streamed = count + max(1, math.ceil(over / model.layer))
        if streamed <= model.layers:
            return Fit(streamed, count, model.weights + rest - (streamed - count) * model.layer)
    return None


def tightest(model: Scored) -> Fit:
    """The smallest placement."""
    needed = model.weights - (model.layers - 1) * model.layer + model.working
    return Fit(model.layers, 1, needed + CONTEXT + OFFLOADING_CONTEXT + WORKSPACES)
