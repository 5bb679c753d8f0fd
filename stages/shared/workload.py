"""The inputs of stages/shared/placement.py: the base model's shape, the rows and the settings."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from stages.shared.base_bytes import BLOCK
from stages.shared.decoder_shape import Experts, Linear, Shape, Training
from stages.shared.embeddings import set_vocabulary
from stages.shared.experts import OWN_CODE, expert_stacks, expert_tensors, width_refused
from stages.shared.fast_path import LIGER, choose_fast_path, is_swiglu, plain_layers
from stages.shared.kept import count_kept
from stages.shared.linears import adaptable_linears, quantized_linears, targets_of
from stages.shared.mxfp4 import STORAGE
from stages.shared.outputs import read_json
from stages.shared.params import Params, Train
from stages.shared.process import StageError
from stages.shared.rows import lengths
from stages.shared.text_model import (
    chosen_experts,
    head_size,
    kept_in_float32,
    number_of,
    read_config,
)

# Rates of dropout in configurations, of the results of attention and MLP.
RESULT_DROPOUT = ("residual_dropout", "resid_pdrop", "resid_dropout", "hidden_dropout", "dropout")


@dataclass(frozen=True)
class Lengths:
    """Tokens and learned tokens of each training row; `max_length` is the width of a pack.

    added, known  ids whose rows are trained: of tokens that prepare added, and of the model's own
    """

    tokens: list[int]
    learned: list[int]
    max_length: int
    added: tuple[int, ...] = ()
    known: tuple[int, ...] = ()

    @property
    def trained(self) -> tuple[int, ...]:
        return self.known + self.added

    @property
    def vocabulary(self) -> int:
        """Rows that the embeddings must have for them."""
        return max(self.trained, default=-1) + 1


def read_lengths(prepared: Path) -> Lengths:
    """Lengths of every training row, and the width of a pack."""
    with pa.memory_map(str(prepared / "train.arrow")) as source:
        tokens, learned = lengths(pyarrow.ipc.open_stream(source).read_all())
    about = read_json(prepared / "prepared.json")
    added, known = (tuple(about.get(f"{key}_tokens", {}).values()) for key in ("new", "known"))
    return Lengths(tokens, learned, about["max_length"], added, known)


def read_model(folder: Path, vocabulary: int = 0) -> tuple[PretrainedConfig, Shape]:
    """The model of `folder`/config.json, extended to a `vocabulary`; no weights are read."""
    try:
        config = read_config(folder)
        set_vocabulary(config, vocabulary)
        return config, shape_of(config)
    except (AttributeError, KeyError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise StageError(f"{folder}/config.json: unsupported by plan: {reason}") from None


def shape_of(config: PretrainedConfig) -> Shape:
    """The shape of the model, from its modules on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    text, head = config.get_text_config(), model.get_output_embeddings()
    quantized, adaptable = quantized_linears(model), set(adaptable_linears(model))
    linears = tuple(
        Linear(name, module.in_features, module.out_features, name in quantized, name in adaptable)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )
    float32 = kept_in_float32(model)
    experts = tuple(Experts(name, *x.shape) for name, x in expert_tensors(model).items())
    heads = number_of(text, "num_attention_heads")
    if not heads or not linears:
        raise ValueError("it has no layers of attention and products")
    head_dim = head_size(text, model)
    # If layers differ, the widest keys.
    keys = max((x.outputs for x in linears if x.name.endswith(".k_proj")), default=0)
    shape = Shape(
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        hidden=text.hidden_size,
        # Independent of names: the input of a layer's last product.
        intermediate=number_of(text, "intermediate_size") or max(x.inputs for x in linears),
        heads=heads,
        kv_heads=number_of(text, "num_key_value_heads") or keys // head_dim or heads,
        head_dim=head_dim,
        swiglu=any(map(is_swiglu, model.modules())),
        plain=bool(plain_layers(model)),
        more_norms=more_norms(model, heads, head_dim),
        linears=linears,
        other_parameters=model.num_parameters()
        - sum(x.parameters for x in linears)
        - sum(x.parameters for x in experts),
        float32_parameters=sum(
            tensor.numel() for name, tensor in model.named_parameters() if name in float32
        ),
        liger=model.config.model_type in LIGER,
        layer_norms=any(type(module) is torch.nn.LayerNorm for module in model.modules()),
        drops=any(getattr(text, name, 0) for name in RESULT_DROPOUT),
        sinks=any(name.endswith(".sinks") for name, _ in model.named_parameters()),
        experts=experts,
        mxfp4=in_mxfp4(config),
        **(experts_shape(model) if experts else {}),
    )
    return shape if shape.liger else with_kept(shape, model)


def with_kept(shape: Shape, model: PreTrainedModel) -> Shape:
    """`shape` with what its layers keep, where they can be run on the meta device."""
    kept = count_kept(model, shape.layers)
    if kept is None:
        return shape
    return replace(
        shape,
        linears=tuple(replace(x, reads=kept.reads.get(x.name)) for x in shape.linears),
        attention_bytes=kept.attention,
        between_bytes=kept.between,
    )


def more_norms(model: PreTrainedModel, heads: int, head_dim: int) -> float:
    """Shape.more_norms: norms of q and k read every head, others the whole residual stream."""
    text = model.config.get_text_config()
    keys = number_of(text, "num_key_value_heads") or heads
    read = 0
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if "Norm" in type(module).__name__ and weight is not None and re.search(r"\.\d+\.", name):
            short = name.rsplit(".", 1)[-1].removesuffix("norm").removesuffix("layer")
            times = {"q_": heads, "query_": heads, "k_": keys, "key_": keys}.get(short, 1)
            read += weight.numel() * (times if weight.numel() <= head_dim else 1)
    return max(0.0, read / text.num_hidden_layers - 2 * text.hidden_size)


def in_mxfp4(config: PretrainedConfig) -> bool:
    """Whether experts are in MXFP4, as the checkpoint's config or quantize's says."""
    said = getattr(config, "quantization_config", None) or {}
    return "mxfp4" in (getattr(config, STORAGE, None), said.get("quant_method"))


def experts_shape(model: PreTrainedModel) -> dict[str, Any]:
    """The fields of a Shape that describe a mixture of experts, except their tensors."""
    stacks = expert_stacks(model)
    first, stack = next(iter(stacks.items()))
    # Rows or columns, whichever does not have the width of the residual stream.
    turned = getattr(stack, "is_transposed", type(stack).__name__ in OWN_CODE)
    down = stack.get_parameter("down_proj").shape
    width = down[1] if turned else down[2]
    beside = model.get_submodule(first.rpartition(".")[0])
    return {
        "chosen": chosen_experts(model.config.get_text_config()),
        "expert_width": width,
        "gate_bytes": gate_bytes(stack, width),
        "own_code": type(stack).__name__ in OWN_CODE,
        "shared_width": sum(
            module.in_features
            for name, module in beside.named_modules()
            if isinstance(module, torch.nn.Linear) and name.endswith("down_proj")
        ),
    }


def gate_bytes(stack: Any, width: int) -> int:
    """Bytes that autograd keeps of one row between the two products of `stack`, in bfloat16."""
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    gated = getattr(stack, "has_gate", True)
    row = torch.empty(1, (1 + gated) * width, dtype=torch.bfloat16, device="meta")
    row.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        if not gated:
            stack.act_fn(row)
        elif hasattr(stack, "_apply_gate"):
            stack._apply_gate(row)
        else:
            gate, up = row.chunk(2, dim=-1)
            _ = up * stack.act_fn(gate)
    return sum(storage.nbytes() for storage in kept.values())


def check_expert_lora(config: PretrainedConfig, shape: Shape) -> None:
    """Raise StageError where `lora.experts` cannot be had."""
    if not shape.experts or shape.own_code:
        reason = "computes its experts by code of its own" if shape.experts else "has no experts"
        raise StageError(
            f"params.yaml: lora.experts: {config.model_type} {reason}; set lora.experts: false"
        )


def check_expert_widths(shape: Shape) -> None:
    """Raise StageError for experts that quantize would refuse."""
    for each in () if shape.mxfp4 else shape.experts:
        if each.columns % BLOCK:
            raise StageError(width_refused(each.name, each.columns))


def match_targets(shape: Shape, wanted: str | list[str]) -> frozenset[str]:
    """Names of the Linears that get an adapter. Raises StageError as targets_of does."""
    names = (linear.name for linear in shape.linears if linear.adaptable)
    return frozenset(targets_of(wanted, names, bool(shape.experts)))


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
    shape: Shape,
    params: Params,
    rows: Lengths,
    nf4: bool,
    double_quant: bool,
) -> Training:
    """The settings of training on an NVIDIA GPU, with a base in NF4 or 16 bit. Raises StageError as
    training would."""
    if params.lora.experts:
        check_expert_lora(config, shape)
    if nf4:
        check_expert_widths(shape)
    fast = choose_fast_path(params, config, gpu=True)
    count, tokens, learned = largest_step(rows, params.train, fast.padding_free)
    return Training(
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
        token_rows=len(rows.trained) * (1 if config.tie_word_embeddings else 2),
        experts=params.lora.experts,
        packed=params.train.batching == "packing",
    )


# train.gradient_checkpointing -> the argument `kept` of placement.choose.
KEPT = {"auto": "auto", True: "none", False: "all"}
