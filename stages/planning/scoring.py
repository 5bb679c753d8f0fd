"""GPU memory of the stages that score a model."""

from pathlib import Path

import pyarrow as pa
import pyarrow.ipc

from stages.shared.fitting import Decoder, Scored, scored
from stages.shared.rows import token_counts
from stages.shared.sets import held_out_sets
from stages.shared.vram import Shape, Training, adapter_parameters


def scoring_stages(shape: Shape, run: Training, longest: int) -> dict[str, Scored]:
    """What evaluate and verify have on the card, with rows of at most `longest` tokens: the base
    with its adapter, and the merged model."""
    adapter = 4.0 * adapter_parameters(shape, run.rank, run.targets)
    decoder = decoder_of(shape)
    base = scored(decoder, run.method == "qlora", run.double_quant, longest, adapter)
    return {"evaluate": base, "verify": scored(decoder, False, False, longest, 0.0)}


def decoder_of(shape: Shape) -> Decoder:
    return Decoder(
        layers=shape.layers,
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        keys=2 * shape.kv_heads * shape.head_dim,
        linears=sum(x.parameters for x in shape.linears),
        largest=max(x.parameters for x in shape.linears),
        others=shape.other_parameters,
    )


def longest_held_out(prepared: Path) -> int:
    """Tokens of the longest scored row."""
    longest = 0
    for file in held_out_sets(prepared).values():
        with pa.memory_map(str(file)) as source:
            longest = max(longest, *token_counts(pyarrow.ipc.open_stream(source).read_all()))
    return longest
