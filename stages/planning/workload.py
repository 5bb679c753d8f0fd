"""What training is asked to do: the base model's shape, the rows and the settings, for the VRAM
model; and settings that ask for less."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from stages.shared import vram
from stages.shared.fast_path import choose_fast_path, plain_layers, step_tokens
from stages.shared.outputs import GB, read_json
from stages.shared.params import Params, Train
from stages.shared.process import StageError
from stages.shared.rows import lengths


@dataclass(frozen=True)
class Lengths:
    """Tokens and learned tokens of each training row; `max_length` is the width of a pack."""

    tokens: list[int]
    learned: list[int]
    max_length: int


def read_lengths(prepared: Path) -> Lengths:
    """Lengths of every training row, and what packing fills rows up to."""
    with pa.memory_map(str(prepared / "train.arrow")) as source:
        tokens, learned = lengths(pyarrow.ipc.open_stream(source).read_all())
    return Lengths(tokens, learned, read_json(prepared / "prepared.json")["max_length"])


def read_model(folder: Path) -> tuple[PretrainedConfig, vram.Shape]:
    """The model of `folder`/config.json; no weights are read."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        return config, shape_of(config)
    except (AttributeError, KeyError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise StageError(f"{folder}/config.json: not a decoder that plan knows: {reason}") from None


def shape_of(config: PretrainedConfig) -> vram.Shape:
    """The shape of the model, read off its modules, which are built on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if any(".experts." in name for name, _ in model.named_parameters()):
        # peft would also adapt the fused experts, which merge refuses when all is trained.
        raise ValueError("mixtures of experts cannot be merged; choose a dense base model")
    text = config.get_text_config()
    heads, head = text.num_attention_heads, model.get_output_embeddings()
    linears = tuple(
        vram.Linear(name, module.in_features, module.out_features)
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and module is not head
    )
    return vram.Shape(
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        silu=getattr(text, "hidden_act", None) == "silu",
        plain=bool(plain_layers(model)),
        linears=linears,
        other_parameters=model.num_parameters() - sum(x.parameters for x in linears),
    )


def match_targets(shape: vram.Shape, wanted: str | list[str]) -> frozenset[str]:
    """Names of the Linears that get an adapter, matched as peft does (by the end of the name).

    Raises StageError for a name that is no Linear of the base: peft would skip it in silence.
    """
    names = [x.name for x in shape.linears]
    if wanted == "all-linear":
        return frozenset(names)
    found = set()
    for target in wanted:
        matches = [n for n in names if n == target or n.endswith(f".{target}")]
        if not matches:
            short = sorted({n.rsplit(".", 1)[-1] for n in names})
            near = difflib.get_close_matches(target, short, 1, 0.4)
            hint = f"did you mean {near[0]}? " if near else ""
            raise StageError(
                f"params.yaml: lora.target_modules: {target} is no linear layer of the base "
                f"that can be adapted; {hint}It has {', '.join(short)}"
            )
        found.update(matches)
    return frozenset(found)


def largest_step(rows: Lengths, train: Train, padding_free: bool) -> tuple[int, int, int]:
    """(rows, tokens, learned tokens) that the largest step holds on the device."""
    size = min(train.batch_size, len(rows.tokens))
    if train.batching == "packing":
        room = min(train.batch_size * rows.max_length, sum(rows.tokens))
        return 1, room, min(room, sum(rows.learned))
    learned = sum(sorted(rows.learned)[-size:])
    if padding_free:
        return 1, sum(sorted(rows.tokens)[-size:]), learned
    return size, size * max(rows.tokens), learned


def planned_training(config, shape: vram.Shape, params: Params, rows: Lengths) -> vram.Training:
    """The settings as training uses them on an NVIDIA GPU. Raises StageError as it would."""
    full = step_tokens(params.train, rows.tokens, rows.max_length)
    fast = choose_fast_path(params, config, full, gpu=True)
    count, tokens, learned = largest_step(rows, params.train, fast.padding_free)
    return vram.Training(
        method="qlora" if params.quantize.type == "nf4" else "lora",
        double_quant=params.quantize.double_quant,
        rank=params.lora.r,
        targets=match_targets(shape, params.lora.target_modules),
        dropout=params.lora.dropout,
        optimizer=params.train.optimizer,
        rows=count,
        # A pack may hold one row alone.
        sequences=min(params.train.batch_size, len(rows.tokens)),
        tokens=tokens,
        learned_tokens=learned,
        accumulation=params.train.gradient_accumulation,
        checkpointing=params.train.gradient_checkpointing,
        offloading=fast.offload,
        attention=fast.attention,
        liger=fast.liger,
        fused_lora=fast.fused_lora,
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
    smallest = {"batch_size": size, "gradient_accumulation": times}
    if not train.gradient_checkpointing:
        yield change("train", gradient_checkpointing=True)
        if size < train.batch_size:
            yield change("train", gradient_checkpointing=True, **smallest)
    if params.quantize.type == "none":
        yield change("quantize", type="nf4", double_quant=True)
    if lora.dropout > 0:
        yield change("lora", dropout=0.0)
    if train.optimizer != "paged_adamw_8bit":
        yield change("train", optimizer="paged_adamw_8bit")
    for rank in (64, 16, 8):
        if rank < lora.r:
            yield change("lora", r=rank)


def cheapest_change(config, shape: vram.Shape, params: Params, rows: Lengths, limit: float) -> str:
    """The first of `changes` after which `limit` bytes are enough, as -S takes it."""
    for text, changed in changes(params):
        needed = vram.predict(shape, planned_training(config, shape, changed, rows)).device
        if needed <= limit:
            return f"{text} ({needed / GB:.2f} GB)"
    return "none of the settings alone; take a smaller base or a shorter prepare.max_length"
