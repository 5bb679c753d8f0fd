"""GPU memory of the stages that score a model."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc

from stages.shared.base_bytes import chunk_values
from stages.shared.decoder_shape import Shape, Training, trained_parameters
from stages.shared.embeddings import copy_bytes
from stages.shared.fitting import Decoder, Scored, scored
from stages.shared.rows import token_counts
from stages.shared.sets import held_out_sets


def scoring_stages(shape: Shape, run: Training, longest: int) -> dict[str, Scored]:
    """What evaluate and verify have on the card, with rows of at most `longest` tokens: the base
    with its adapter, and the merged model."""
    adapter = 4.0 * trained_parameters(shape, run)
    if run.token_rows:
        adapter += copy_bytes(shape.vocabulary, shape.hidden, on_gpu=True)
    decoder = decoder_of(shape)
    base = scored(decoder, run.method == "qlora", run.double_quant, longest, adapter)
    merged = replace(decoder, mxfp4=0)
    return {"evaluate": base, "verify": scored(merged, False, False, longest, 0.0)}


def decoder_of(shape: Shape) -> Decoder:
    return Decoder(
        layers=shape.layers,
        hidden=shape.hidden,
        intermediate=widest(shape),
        keys=2 * shape.kv_heads * shape.head_dim,
        linears=sum(x.parameters for x in shape.linears) + shape.expert_parameters,
        largest=max(chunk_values(shape), *(x.parameters for x in shape.linears)),
        others=shape.other_parameters,
        mxfp4=shape.expert_parameters if shape.mxfp4 else 0,
    )


def widest(shape: Shape) -> int:
    """The width that decides what a token at work takes: of an MLP, or of all experts of a token.

    Of those it may be the results that are widest, with three times 2H bytes.
    """
    if not shape.experts:
        return shape.intermediate
    dense = max(max(x.inputs, x.outputs) for x in shape.linears)
    return max(dense, shape.chosen * max(shape.expert_width, shape.hidden // 2))


def longest_held_out(prepared: Path) -> int:
    """Tokens of the longest scored row."""
    longest = 0
    for file in held_out_sets(prepared).values():
        with pa.memory_map(str(file)) as source:
            longest = max(longest, *token_counts(pyarrow.ipc.open_stream(source).read_all()))
    return longest
