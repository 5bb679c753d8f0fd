"""Predict the VRAM that training needs, before a GPU is touched, and refuse what would not fit.

    python -m stages.plan

Reads models/tokenizer/config.json (no weights) and the row lengths of data/prepared.
Writes metrics/plan.json and models/plan.ok, the same bytes whenever training may start.
"""

import difflib
import json
from collections.abc import Iterator
from pathlib import Path

from stages.shared.params import Params, load_params
from stages.shared.rows import PREPARED
from stages.shared.stage import StageError, begin, write_metrics, write_text

if __name__ == "__main__":
    begin("plan")

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stages.shared import vram

CONFIG = Path("models/tokenizer")
METRICS = Path("metrics/plan.json")
VERDICT = Path("models/plan.ok")


def read_shape(folder: Path) -> vram.Shape:
    """The model of `folder`/config.json, built on the meta device: shapes without weights."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        text = config.get_text_config()
        heads, intermediate = text.num_attention_heads, text.intermediate_size
    except (AttributeError, KeyError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise StageError(f"{folder}/config.json: not a decoder that plan knows: {reason}") from None
    head = model.get_output_embeddings()
    linears = tuple(
        vram.Linear(name, module.in_features, module.out_features)
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and module is not head
    )
    return vram.Shape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=intermediate,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
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


def read_lengths(prepared: Path) -> tuple[list[int], list[int]]:
    """Tokens and learned tokens of every training row."""
    with pa.memory_map(str(prepared / "train.arrow")) as source:
        table = pyarrow.ipc.open_stream(source).read_all()
        tokens = pc.list_value_length(table["input_ids"]).to_pylist()
        rows = pc.list_parent_indices(table["labels"])
        learned = pc.filter(rows, pc.not_equal(pc.list_flatten(table["labels"]), -100))
        counts = {c["values"]: c["counts"] for c in pc.value_counts(learned).to_pylist()}
    return tokens, [counts.get(i, 0) for i in range(len(tokens))]


def largest_step(tokens: list[int], learned: list[int], params: Params, max_length: int) -> tuple:
    """(rows, tokens, learned tokens) of the largest step on the device."""
    size = min(params.train.batch_size, len(tokens))
    if params.train.batching == "packing":
        room = min(params.train.batch_size * max_length, sum(tokens))
        return 1, room, min(room, sum(learned))
    return size, size * max(tokens), sum(sorted(learned)[-size:])


def training(shape: vram.Shape, params: Params, step: tuple[int, int, int]) -> vram.Training:
    """The settings as stages/train.py would use them on an NVIDIA GPU."""
    rows, tokens, learned = step
    packed = params.train.batching == "packing"
    attention = {"auto": "varlen" if packed else "sdpa", "flash_attention_2": "varlen"}
    return vram.Training(
        method="qlora" if params.quantize.type == "nf4" else "lora",
        double_quant=params.quantize.double_quant,
        rank=params.lora.r,
        targets=match_targets(shape, params.lora.target_modules),
        dropout=params.lora.dropout,
        optimizer=params.train.optimizer,
        rows=rows,
        tokens=tokens,
        learned_tokens=learned,
        accumulation=params.train.gradient_accumulation,
        checkpointing=params.train.gradient_checkpointing,
        offloading=params.train.gradient_checkpointing and packed,
        attention=attention.get(params.train.attention, params.train.attention),
        fused=True,
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


def cheapest_change(shape, lengths, params: Params, max_length: int, limit: float) -> str:
    """The first change of `changes` after which `limit` bytes are enough, as -S options."""
    for text, changed in changes(params):
        step = largest_step(*lengths, changed, max_length)
        needed = vram.predict(shape, training(shape, changed, step)).device
        if needed <= limit:
            return f"{text} ({needed / vram.GB:.2f} GB)"
    return "no single change does; take a smaller base or a shorter prepare.max_length"


def table(prediction: vram.Prediction, run: vram.Training, shape: vram.Shape) -> str:
    """Where each GB goes."""
    rows = [
        ("base weights", prediction.weights, f"{shape.parameters / 1e9:.3f}e9 parameters"),
        ("adapter", prediction.adapter, f"rank {run.rank}, weights and gradients"),
        ("optimizer", prediction.optimizer, run.optimizer),
        ("activations", prediction.activations, f"{run.tokens} tokens a step"),
        ("logits", prediction.logits, f"{run.learned_tokens} learned tokens"),
        ("training allocates", prediction.peak, f"most in {prediction.moment}"),
        ("context, fragments", prediction.overhead, "CUDA itself, and memory reserved in vain"),
        ("the card must have", prediction.device, ""),
    ]
    return "\n".join(
        f"  {name:<20}{size / vram.GB:>8.2f} GB  {why}".rstrip() for name, size, why in rows
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


def report(shape, lengths, params: Params, max_length: int, run: vram.Training) -> None:
    """Print the table, the cards it fits and what would make the next smaller card do."""
    prediction = vram.predict(shape, run)
    fits = vram.fitting_cards(prediction.device)
    print(table(prediction, run, shape))
    print(f"Fits cards of {', '.join(map(str, fits)) or 'no usual size in'} GB.")
    smaller = [size for size in vram.CARDS_GB if size not in fits]
    if smaller:
        advice = cheapest_change(shape, lengths, params, max_length, smaller[-1] * vram.GB)
        print(f"To fit {smaller[-1]} GB: {advice}")


def refuse_over_limit(shape, lengths, params, max_length, run) -> None:
    """Raise StageError when plan.vram_limit_gb is exceeded."""
    limit, needed = params.plan.vram_limit_gb, vram.predict(shape, run).device / vram.GB
    if limit is not None and needed > limit:
        advice = cheapest_change(shape, lengths, params, max_length, limit * vram.GB)
        raise StageError(
            f"training would need {needed:.2f} GB and plan.vram_limit_gb is {limit:g}; "
            f"cheapest change: {advice}"
        )


def main() -> None:
    params = load_params()
    shape = read_shape(CONFIG)
    lengths = read_lengths(PREPARED)
    max_length = json.loads((PREPARED / "prepared.json").read_text())["max_length"]
    run = training(shape, params, largest_step(*lengths, params, max_length))
    where = "this GPU" if torch.cuda.is_available() else "an NVIDIA GPU (this machine has none)"
    print(f"plan: predicting the VRAM for {len(lengths[0])} rows on {where}")
    report(shape, lengths, params, max_length, run)
    refuse_over_limit(shape, lengths, params, max_length, run)
    write_metrics(METRICS, metrics(shape, run))
    write_text(VERDICT, "training may start\n")


if __name__ == "__main__":
    main()
