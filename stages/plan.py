"""Predict the VRAM that training needs, before a GPU is touched, and refuse what would not fit.

    python -m stages.plan

Reads models/tokenizer/config.json (no weights) and the row lengths of data/prepared.
Writes metrics/plan.json and models/plan.ok, the same bytes whenever training may start.
"""

from pathlib import Path

from stages.shared.libraries import load_libraries
from stages.shared.outputs import GB, check_sums, write_metrics, write_text
from stages.shared.params import Params, load_params
from stages.shared.process import StageError, begin

if __name__ == "__main__":
    begin("plan")
    load_libraries("transformers.modeling_utils")

import torch

from stages.planning import workload
from stages.planning.token_ids import check_token_ids
from stages.shared import vram
from stages.shared.paths import PREPARED, TOKENIZER

METRICS = Path("metrics/plan.json")
VERDICT = Path("models/plan.ok")
# Bytes of a trained value, beside its gradient, where DDP adds up what ranks have: float32.
BUCKET = 4
# Host memory of a process that trains on a GPU, layer inputs and mapped weights not counted: the
# 4.2e9 of train in benchmarks/results/cards.json less the 2.1e9 of the inputs there.
RANK_HOST = 2.1e9


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
    return "\n".join(f"  {n:<20}{size / GB:>8.3f} GB  {why}".rstrip() for n, size, why in lines)


def further_gpus(shape: vram.Shape, run: vram.Training) -> str:
    """What several GPUs cost: each has a rank of its own, with a share of a step's rows."""
    adapter = vram.adapter_parameters(shape, run.rank, run.targets)
    buckets = BUCKET * adapter
    # Two of 16 bit a layer, in locked memory.
    kept = 2 * 2 * shape.hidden * run.tokens * shape.layers if run.offloading else 0
    lines = [
        ("gradient buckets", buckets, "on each card, beside the table above"),
        ("layer inputs", kept, "of host memory for each rank, at the table's tokens a step"),
        ("a rank itself", RANK_HOST, "of host memory: Python, libraries, CUDA"),
    ]
    return "plan: with several GPUs, for each\n" + "\n".join(
        f"  {name:<20}{size / GB:>8.3f} GB  {why}" for name, size, why in lines if size
    )


def metrics(shape: vram.Shape, run: vram.Training) -> dict:
    """metrics/plan.json."""
    prediction, every = vram.predict(shape, run), vram.methods(shape, run)
    fits = vram.fitting_cards(prediction.device)
    parts = ("weights", "adapter", "optimizer", "activations", "logits", "overhead")
    return {
        "predicted_peak_vram_gb": prediction.peak / GB,
        "predicted_device_gb": prediction.device / GB,
        **{f"{part}_gb": getattr(prediction, part) / GB for part in parts},
        "full_finetune_gb": every["full"].device / GB,
        "lora_gb": every["lora"].device / GB,
        "qlora_gb": every["qlora"].device / GB,
        "smallest_gpu_gb": fits[0] if fits else None,
    }


def advice(config, shape: vram.Shape, params: Params, rows: workload.Lengths, needed: float) -> str:
    """Which cards hold `needed` bytes, what would make the next smaller one do, and whether a row
    is longer than the model's positions: it would train without a complaint, and badly."""
    fits = vram.fitting_cards(needed)
    lines = [f"fits cards of {', '.join(map(str, fits)) or 'no usual size in'} GB"]
    if smaller := [size for size in vram.CARDS_GB if size not in fits]:
        change = workload.cheapest_change(config, shape, params, rows, smaller[-1] * GB)
        lines.append(f"to fit {smaller[-1]} GB: {change}")
    longest = max(rows.tokens)
    positions = getattr(config.get_text_config(), "max_position_embeddings", longest)
    if longest > positions:
        lines.append(
            f"the longest row has {longest:,} tokens and the model was made for {positions:,} "
            "(max_position_embeddings); lower prepare.max_length"
        )
    return "\n".join(f"plan: {line}" for line in lines)


def refuse_over_limit(
    config, shape: vram.Shape, params: Params, rows: workload.Lengths, needed: float
) -> None:
    """Raise StageError when plan.vram_limit_gb is exceeded."""
    limit = params.plan.vram_limit_gb
    if limit is not None and needed > limit * GB:
        change = workload.cheapest_change(config, shape, params, rows, limit * GB)
        raise StageError(
            f"training would need {needed / GB:.2f} GB and plan.vram_limit_gb is {limit:g}; "
            f"cheapest change that fits: {change}"
        )


def main() -> None:
    params = load_params()
    check_sums(TOKENIZER, "fetch_model")
    check_sums(PREPARED, "prepare")
    config, shape = workload.read_model(TOKENIZER)
    check_token_ids(config, PREPARED)
    rows = workload.read_lengths(PREPARED)
    run = workload.planned_training(config, shape, params, rows)
    prediction = vram.predict(shape, run)
    where = "this GPU" if torch.cuda.is_available() else "an NVIDIA GPU; this machine has none"
    print(f"plan: the VRAM that training needs on {where}, {len(rows.tokens)} rows")
    print(table(prediction, run, shape))
    print(further_gpus(shape, run))
    print(advice(config, shape, params, rows, prediction.device))
    refuse_over_limit(config, shape, params, rows, prediction.device)
    write_metrics(METRICS, metrics(shape, run))
    write_text(VERDICT, "training may start\n")


if __name__ == "__main__":
    main()
