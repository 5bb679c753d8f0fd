"""Settings that need less memory."""

from collections.abc import Iterator

from transformers import PretrainedConfig

from stages.shared import placement
from stages.shared.decoder_shape import Shape, Training
from stages.shared.outputs import GB
from stages.shared.params import Params
from stages.shared.vram import sizes_of
from stages.shared.workload import KEPT, Lengths, planned_training


def planned(config: PretrainedConfig, shape: Shape, params: Params, rows: Lengths) -> Training:
    """The training run that `params` describe."""
    quantize = params.quantize
    return planned_training(
        config, shape, params, rows, quantize.type == "nf4", quantize.double_quant
    )


def changes(params: Params) -> Iterator[tuple[str, Params]]:
    """Settings that need less memory, those that cost least time and quality first."""

    def change(section: str, **values) -> tuple[str, Params]:
        new = getattr(params, section).model_copy(update=values)
        text = ", ".join(f"{section}.{k}={v}" for k, v in values.items())
        return text, params.model_copy(update={section: new})

    train, lora = params.train, params.lora
    size, times = train.batch_size, train.gradient_accumulation
    while size % 2 == 0:
        size, times = size // 2, times * 2
        yield change("train", batch_size=size, gradient_accumulation=times)
    smallest = {"batch_size": size, "gradient_accumulation": times}
    if train.gradient_checkpointing is False:
        yield change("train", gradient_checkpointing="auto")
        if size < train.batch_size:
            yield change("train", gradient_checkpointing="auto", **smallest)
    if params.quantize.type == "none":
        yield change("quantize", type="nf4", double_quant=True)
    if lora.dropout > 0:
        yield change("lora", dropout=0.0)
    if train.optimizer != "paged_adamw_8bit":
        yield change("train", optimizer="paged_adamw_8bit")
    for rank in (64, 16, 8):
        if rank < lora.r:
            yield change("lora", r=rank)


def cheapest_change(
    config: PretrainedConfig, shape: Shape, params: Params, rows: Lengths, limit: float
) -> str:
    """The first of `changes` that fits into `limit` bytes, in words."""
    for text, changed in changes(params):
        sizes = sizes_of(shape, planned(config, shape, changed, rows))
        kept = KEPT[changed.train.gradient_checkpointing]
        if placed := placement.choose(sizes, limit, kept=kept):
            needed = placement.predict(sizes, placed).device / GB
            return f"cheapest change that fits: {text} ({needed:.2f} GB)"
    return "no single setting is enough; use a smaller base or a shorter prepare.max_length"
