"""Predict the VRAM that training needs, before a GPU is touched, and refuse what would not fit.

    python -m stages.plan

Reads models/tokenizer/config.json (no weights) and the row lengths of data/prepared.
Writes metrics/plan.json and models/plan.ok, the same bytes whenever training may start.
"""

import difflib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stages.shared.params import Params, Train, load_params
from stages.shared.stage import StageError, begin, write_metrics, write_text

if __name__ == "__main__":
    begin("plan")

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from stages.shared import attention, vram
from stages.shared.rows import IGNORED, PREPARED

CONFIG = Path("models/tokenizer")
METRICS = Path("metrics/plan.json")
VERDICT = Path("models/plan.ok")


@dataclass(frozen=True)
class Rows:
    """Tokens and learned tokens of each training row; `max_length` is the width of a pack."""

    tokens: list[int]
    learned: list[int]
    max_length: int


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
        plain=any(type(module).__name__ in vram.PLAIN_LAYERS for module in model.modules()),
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
            raise StageError(
                f"params.yaml: lora.target_modules: {target} is no linear layer of the base "
                f"that can be adapted; "
                + (f"did you mean {near[0]}? " if near else "")
                + f"It has {', '.join(short)}"
            )
        found.update(matches)
    return frozenset(found)


def read_rows(prepared: Path) -> Rows:
    """Lengths of every training row, and what packing fills rows up to."""
    with pa.memory_map(str(prepared / "train.arrow")) as source:
        table = pyarrow.ipc.open_stream(source).read_all()
        tokens = pc.list_value_length(table["input_ids"]).to_pylist()
        row = pc.list_parent_indices(table["labels"])
        learned = pc.filter(row, pc.not_equal(pc.list_flatten(table["labels"]), IGNORED))
        counts = {c["values"]: c["counts"] for c in pc.value_counts(learned).to_pylist()}
    prepared_json = json.loads((prepared / "prepared.json").read_text(encoding="utf-8"))
    learned_tokens = [counts.get(i, 0) for i in range(len(tokens))]
    return Rows(tokens, learned_tokens, prepared_json["max_length"])


def attention_of(train: Train, config: PretrainedConfig) -> str:
    """The attention that training takes on an NVIDIA GPU, by its demands on memory."""
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
    """The settings as training uses them on an NVIDIA GPU (stages/shared/trainer.py)."""
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


def table(prediction: vram.Prediction, run: vram.Training, shape: vram.Shape) -> str:
    """Where each GB goes, at the moment of a step that needs most."""
    size = f"{shape.parameters / 1e9:.3f}e9 parameters"
    kind = {"qlora": "NF4", "lora": "16 bit"}[run.method]
    saving = ", checkpointed" * run.checkpointing + ", kept in host memory" * run.offloading
    lines = [
        ("base weights", prediction.weights, f"{size}, {kind}"),
        ("adapter", prediction.adapter, f"rank {run.rank}: weights and gradients, float32"),
        ("optimizer", prediction.optimizer, run.optimizer),
        ("activations", prediction.activations, f"{run.tokens} tokens a step{saving}"),
        ("output head", prediction.logits, f"{run.learned_tokens} learned tokens"),
        ("workspaces", prediction.workspaces, "of the matrix products"),
        ("training allocates", prediction.peak, f"most in {prediction.moment}"),
        ("reserve", prediction.reserve, "CUDA itself, and gaps between allocations"),
        ("the card must have", prediction.device, ""),
    ]
    return "\n".join(
        f"  {n:<20}{size / vram.GB:>8.3f} GB  {why}".rstrip() for n, size, why in lines
    )


def metrics(shape: vram.Shape, run: vram.Training) -> dict:
    """metrics/plan.json."""
    prediction, every = vram.predict(shape, run), vram.methods(shape, run)
    fits = vram.fitting_cards(prediction.device)
    parts = ("weights", "adapter", "optimizer", "activations", "logits", "overhead")
    return {
        "predicted_peak_vram_gb": prediction.peak / vram.GB,
        "predicted_device_gb": prediction.device / vram.GB,
        **{f"{part}_gb": getattr(prediction, part) / vram.GB for part in parts},
        "full_finetune_gb": every["full"].device / vram.GB,
        "lora_gb": every["lora"].device / vram.GB,
        "qlora_gb": every["qlora"].device / vram.GB,
        "smallest_gpu_gb": fits[0] if fits else None,
    }


def advice(config, shape: vram.Shape, params: Params, rows: Rows, needed: float) -> str:
    """Which cards hold `needed` bytes, and what would make the next smaller one do."""
    fits = vram.fitting_cards(needed)
    lines = [f"fits cards of {', '.join(map(str, fits)) or 'no usual size in'} GB"]
    if smaller := [size for size in vram.CARDS_GB if size not in fits]:
        change = cheapest_change(config, shape, params, rows, smaller[-1] * vram.GB)
        lines.append(f"to fit {smaller[-1]} GB: {change}")
    return "\n".join(f"plan: {line}" for line in lines)


def refuse_over_limit(config, shape: vram.Shape, params: Params, rows: Rows, needed: float) -> None:
    """Raise StageError when plan.vram_limit_gb is exceeded."""
    limit = params.plan.vram_limit_gb
    if limit is not None and needed > limit * vram.GB:
        change = cheapest_change(config, shape, params, rows, limit * vram.GB)
        raise StageError(
            f"training would need {needed / vram.GB:.2f} GB and plan.vram_limit_gb is {limit:g}; "
            f"cheapest change that fits: {change}"
        )


def main() -> None:
    params = load_params()
    config, shape = read_model(CONFIG)
    rows = read_rows(PREPARED)
    run = describe(config, shape, params, rows)
    prediction = vram.predict(shape, run)
    where = "this GPU" if torch.cuda.is_available() else "an NVIDIA GPU; this machine has none"
    print(f"plan: the VRAM that training needs on {where}, {len(rows.tokens)} rows")
    print(table(prediction, run, shape))
    print(advice(config, shape, params, rows, prediction.device))
    refuse_over_limit(config, shape, params, rows, prediction.device)
    write_metrics(METRICS, metrics(shape, run))
    write_text(VERDICT, "training may start\n")


if __name__ == "__main__":
    main()
