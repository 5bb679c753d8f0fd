"""From params.yaml and the rows to what the VRAM model is asked, and to cheaper settings."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
from transformers import PretrainedConfig

from stages.planning.shapes import match_targets
from stages.shared import vram
from stages.shared.outputs import read_json
from stages.shared.params import Params, Train
from stages.shared.rows import lengths
from stages.training import attention


@dataclass(frozen=True)
class Rows:
    """Tokens and learned tokens of each training row; `max_length` is the width of a pack."""

    tokens: list[int]
    learned: list[int]
    max_length: int


def read_rows(prepared: Path) -> Rows:
    """Lengths of every training row, and what packing fills rows up to."""
    with pa.memory_map(str(prepared / "train.arrow")) as source:
        table = pyarrow.ipc.open_stream(source).read_all()
        tokens, learned = lengths(table)
    prepared_json = read_json(prepared / "prepared.json")
    return Rows(tokens, learned, prepared_json["max_length"])


def attention_of(train: Train, config: PretrainedConfig) -> str:
    """The attention that training takes on an NVIDIA GPU, by its demands on memory.

    Raises StageError when the model cannot be trained as `train` says.
    """
    attention.check(train, config)
    auto = "varlen" if attention.supports(config) else "sdpa"
    return {"auto": auto, "flash_attention_2": "varlen"}.get(train.attention, train.attention)


def largest_step(rows: Rows, train: Train, kind: str) -> tuple[int, int, int]:
    """(rows, tokens, learned tokens) that the largest step holds on the device."""
    size = min(train.batch_size, len(rows.tokens))
    if train.batching == "packing":
        room = min(train.batch_size * rows.max_length, sum(rows.tokens))
        return 1, room, min(room, sum(rows.learned))
    learned = sum(sorted(rows.learned)[-size:])
    if kind == "varlen":
        return 1, sum(sorted(rows.tokens)[-size:]), learned
    return size, size * max(rows.tokens), learned


def describe(config, shape: vram.Shape, params: Params, rows: Rows) -> vram.Training:
    """The settings as training uses them on an NVIDIA GPU (stages/training/trainer.py)."""
    kind = attention_of(params.train, config)
    count, tokens, learned = largest_step(rows, params.train, kind)
    checkpointing = params.train.gradient_checkpointing
    width = rows.max_length if params.train.batching == "packing" else max(rows.tokens)
    return vram.Training(
        method="qlora" if params.quantize.type == "nf4" else "lora",
        double_quant=params.quantize.double_quant,
        rank=params.lora.r,
        targets=match_targets(shape, params.lora.target_modules),
        dropout=params.lora.dropout,
        optimizer=params.train.optimizer,
        rows=count,
        tokens=tokens,
        learned_tokens=learned,
        accumulation=params.train.gradient_accumulation,
        checkpointing=checkpointing,
        offloading=vram.offloads(shape, checkpointing, params.train.batch_size * width),
        attention=kind,
        liger=importlib.util.find_spec("liger_kernel") is not None,
        fused_lora=params.lora.dropout == 0,
    )


def changes(params: Params) -> Iterator[tuple[str, Params]]:
    """Settings that need less, from the cheapest for time and quality to the dearest."""

    def change(section: str, **values) -> tuple[str, Params]:
        new = getattr(params, section).model_copy(update=values)
        text = ", ".join(f"{section}.{k}={v}".replace("True", "true") for k, v in values.items())
        return text, params.model_copy(update={section: new})

    train, lora = params.train, params.lora
    size, times = train.batch_size, train.gradient_accumulation
    while size % 2 == 0:
        size, times = size // 2, times * 2
        yield change("train", batch_size=size, gradient_accumulation=times)
    if not train.gradient_checkpointing:
        yield change("train", gradient_checkpointing=True)
        if size < train.batch_size:
            yield change(
                "train", gradient_checkpointing=True, batch_size=size, gradient_accumulation=times
            )
    if params.quantize.type == "none":
        yield change("quantize", type="nf4", double_quant=True)
    if lora.dropout > 0:
        yield change("lora", dropout=0.0)
    if train.optimizer != "paged_adamw_8bit":
        yield change("train", optimizer="paged_adamw_8bit")
    for rank in (64, 16, 8):
        if rank < lora.r:
            yield change("lora", r=rank)


def cheapest_change(config, shape: vram.Shape, params: Params, rows: Rows, limit: float) -> str:
    """The first of `changes` after which `limit` bytes are enough, as -S takes it."""
    for text, changed in changes(params):
        needed = vram.predict(shape, describe(config, shape, changed, rows)).device
        if needed <= limit:
            return f"{text} ({needed / vram.GB:.2f} GB)"
    return "none of the settings alone; take a smaller base or a shorter prepare.max_length"
