"""The inputs of stages/shared/placement.py: the base model's shape, the rows and the settings."""

import difflib
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from stages.shared import vram
from stages.shared.fast_path import choose_fast_path, plain_layers
from stages.shared.linears import adaptable_linears, quantized_linears
from stages.shared.outputs import read_json
from stages.shared.params import Params, Train
from stages.shared.process import StageError
from stages.shared.rows import lengths
from stages.shared.text_model import largest_of, number_of, read_config


@dataclass(frozen=True)
class Lengths:
    """Tokens and learned tokens of each training row; `max_length` is the width of a pack."""

    tokens: list[int]
    learned: list[int]
    max_length: int


def read_lengths(prepared: Path) -> Lengths:
    """Lengths of every training row, and the width of a pack."""
    with pa.memory_map(str(prepared / "train.arrow")) as source:
        tokens, learned = lengths(pyarrow.ipc.open_stream(source).read_all())
    return Lengths(tokens, learned, read_json(prepared / "prepared.json")["max_length"])


def read_model(folder: Path) -> tuple[PretrainedConfig, vram.Shape]:
    """The model of `folder`/config.json; no weights are read."""
    try:
        config = read_config(folder)
        return config, shape_of(config)
    except (AttributeError, KeyError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise StageError(f"{folder}/config.json: unsupported by plan: {reason}") from None


def shape_of(config: PretrainedConfig) -> vram.Shape:
    """The shape of the model, from its modules on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if any(".experts." in name for name, _ in model.named_parameters()):
        # peft would also adapt the fused experts, which merge refuses when all is trained.
        raise ValueError("mixtures of experts cannot be merged; choose a dense base model")
    text, head = config.get_text_config(), model.get_output_embeddings()
    quantized, adaptable = quantized_linears(model), set(adaptable_linears(model))
    linears = tuple(
        vram.Linear(
            name, module.in_features, module.out_features, name in quantized, name in adaptable
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )
    heads = number_of(text, "num_attention_heads")
    if not heads or not linears:
        raise ValueError("it has no layers of attention and products")
    head_dim = (
        number_of(text, "head_dim") or largest_of(model, "head_dim") or text.hidden_size // heads
    )
    # If layers differ, the widest keys.
    keys = max((x.outputs for x in linears if x.name.endswith(".k_proj")), default=0)
    return vram.Shape(
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        hidden=text.hidden_size,
        # Independent of names: the input of a layer's last product.
        intermediate=number_of(text, "intermediate_size") or max(x.inputs for x in linears),
        heads=heads,
        kv_heads=number_of(text, "num_key_value_heads") or keys // head_dim or heads,
        head_dim=head_dim,
        silu=getattr(text, "hidden_act", None) == "silu",
        plain=bool(plain_layers(model)),
        linears=linears,
        other_parameters=model.num_parameters() - sum(x.parameters for x in linears),
    )


def match_targets(shape: vram.Shape, wanted: str | list[str]) -> frozenset[str]:
    """Names of the Linears that get an adapter, matched as peft does (by the end of the name).

    Raises StageError for a name that is no Linear of the base: peft would skip it in silence.
    """
    names = [x.name for x in shape.linears if x.adaptable]
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
    """(rows, tokens, learned tokens) of the largest step on the device."""
    size = min(train.batch_size, len(rows.tokens))
    if train.batching == "packing":
        room = min(train.batch_size * rows.max_length, sum(rows.tokens))
        return 1, room, min(room, sum(rows.learned))
    learned = sum(sorted(rows.learned)[-size:])
    if padding_free:
        return 1, sum(sorted(rows.tokens)[-size:]), learned
    return size, size * max(rows.tokens), learned


def planned_training(
    config: PretrainedConfig,
    shape: vram.Shape,
    params: Params,
    rows: Lengths,
    nf4: bool,
    double_quant: bool,
) -> vram.Training:
    """The settings of training on an NVIDIA GPU, with a base in NF4 or 16 bit. Raises StageError as
    training would."""
    fast = choose_fast_path(params, config, gpu=True)
    count, tokens, learned = largest_step(rows, params.train, fast.padding_free)
    return vram.Training(
        method="qlora" if nf4 else "lora",
        double_quant=double_quant,
        rank=params.lora.r,
        targets=match_targets(shape, params.lora.target_modules),
        dropout=params.lora.dropout,
        optimizer=params.train.optimizer,
        rows=count,
        # A pack may contain a single row.
        sequences=min(params.train.batch_size, len(rows.tokens)),
        tokens=tokens,
        learned_tokens=learned,
        accumulation=params.train.gradient_accumulation,
        checkpointing=params.train.gradient_checkpointing is not False,
        offloading=False,
        attention=fast.attention,
        liger=fast.liger,
        fused_lora=fast.fused_lora,
    )


# train.gradient_checkpointing -> the argument `kept` of placement.choose.
KEPT = {"auto": "auto", True: "none", False: "all"}
