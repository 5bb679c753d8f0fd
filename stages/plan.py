"""Predict the GPU memory that training needs, and refuse what would not fit plan.vram_limit_gb.

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
from transformers import PretrainedConfig

from stages.planning.advice import cheapest_change, planned
from stages.planning.new_rows import check_new_rows
from stages.planning.scoring import longest_held_out, scoring_stages
from stages.planning.token_ids import check_token_ids
from stages.shared import placement
from stages.shared.base_bytes import chunk_values, expert_bytes
from stages.shared.decoder_shape import Shape, Training
from stages.shared.fitting import Scored, fit
from stages.shared.paths import PREPARED, TOKENIZER
from stages.shared.placement import Placement, Prediction
from stages.shared.text_model import positions_of
from stages.shared.vram import CARDS_GB, Sizes, sizes_of
from stages.shared.workload import KEPT, Lengths, read_lengths, read_model

METRICS = Path("metrics/plan.json")
VERDICT = Path("models/plan.ok")
# Families whose positions are rows of a table; others compute them.
TABLES = {"codegen", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "opt"}


def table(prediction: Prediction, run: Training, shape: Shape, placed: Placement) -> str:
    """GPU memory by part, at the peak of a step."""
    size = f"{shape.parameters / 1e9:.3f}e9 parameters"
    kind = {"qlora": "NF4", "lora": "16 bit"}[run.method]
    saving = ", kept in host memory" * placed.offload
    lines = [
        ("base weights", prediction.weights, f"{size}, {kind}"),
        ("adapter", prediction.adapter, f"rank {run.rank}: weights and gradients, float32"),
        ("optimizer", prediction.optimizer, run.optimizer),
        ("activations", prediction.activations, f"{run.tokens} tokens a step{saving}"),
        ("output head", prediction.logits, f"{run.learned_tokens} learned tokens"),
        ("workspaces", prediction.workspaces, "matrix products"),
        ("peak allocated", prediction.peak, f"in {prediction.moment}"),
        ("reserve", prediction.reserve, "CUDA context and fragmentation"),
        ("GPU memory needed", prediction.device, ""),
    ]
    return "\n".join(f"  {n:<20}{size / GB:>8.3f} GB  {why}".rstrip() for n, size, why in lines)


def further_gpus(sizes: Sizes, placed: Placement) -> str:
    """Additional memory with several GPUs, each with a rank and a share of a step's rows."""
    lines = [
        ("gradient buckets", sizes.gradients, "GPU memory, each card"),
        ("process", placement.PROCESS, "host memory, each rank: Python, libraries, CUDA"),
        ("layer inputs", placement.waiting(sizes, placed), "host memory, each rank"),
        ("streamed weights", placement.copied(sizes, placed), "host memory, each machine"),
    ]
    return "plan: additional memory with several GPUs:\n" + "\n".join(
        f"  {name:<20}{size / GB:>8.3f} GB  {why}" for name, size, why in lines if size
    )


def cards(sizes: Sizes, kept: str, others: dict[str, Scored]) -> list[dict]:
    """For each usual card size in GB: the placement that training would choose and its needs, and
    how many layers the scoring stages `others` would stream. None if nothing fits."""
    found = []
    for size in CARDS_GB:
        placed = placement.choose(sizes, size * GB, kept=kept)
        fits = {name: fit(model, size * GB) for name, model in others.items()}
        found.append(
            {"card_gb": size, "placed": card(sizes, placed) if placed else None}
            | {f"{name}_streamed_layers": at.streamed if at else None for name, at in fits.items()}
        )
    return found


def card(sizes: Sizes, placed: Placement) -> dict:
    """What `placed` needs of the card, host memory and the bus, in GB to three decimals."""
    prediction = placement.predict(sizes, placed)
    sent, _ = placement.sent_bytes(sizes, placed)
    return {
        "streamed_layers": placed.streamed,
        "kept_mlp_layers": placed.kept_mlp,
        "kept_attention_layers": placed.kept_attention,
        "offloaded_inputs": int(placed.offload),
        "mlp_tile_tokens": placed.tile,
        "dense_layers": placed.dense,
        "predicted_peak_vram_gb": round(prediction.peak / GB, 3),
        "predicted_device_gb": round(prediction.device / GB, 3),
        "predicted_ram_gb": round(prediction.host / GB, 3),
        "sent_gb_per_step": round(sent / GB, 3),
        # Assumes PCIe 4 x16 and a fast consumer card.
        "copies_hide": int(placement.copies_hide(sizes, placed)),
    }


def cards_table(found: list[dict], layers: int) -> str:
    """`cards` as a table for people."""
    lines = [
        "  card GB  weights                 kept (MLP, attention)  GPU GB  RAM GB  evaluate  "
        "verify    GB sent a step",
    ]
    for entry in found:
        size, placed = entry["card_gb"], entry["placed"]
        others = [entry[f"{name}_streamed_layers"] for name in ("evaluate", "verify")]
        words = ["no" if n is None else "streamed" if n else "resident" for n in others]
        if placed is None:
            lines.append(f"  {size:>7}  {'does not fit':<63}{words[0]:<10}{words[1]}")
            continue
        streamed, dense = placed["streamed_layers"], placed["dense_layers"]
        weights = "resident" + f", {dense} in 16 bit" * bool(dense)
        weights = f"{streamed} of {layers} streamed" if streamed else weights
        kept = f"{placed['kept_mlp_layers']}, {placed['kept_attention_layers']} of {layers}"
        remarks = ", MLPs in tiles" * bool(placed["mlp_tile_tokens"])
        remarks += "" if placed["copies_hide"] else ", slower"
        lines.append(
            f"  {size:>7}  {weights:<23} {kept:<22} {placed['predicted_device_gb']:>6.1f}  "
            f"{placed['predicted_ram_gb']:>6.1f}  {words[0]:<10}{words[1]:<10}"
            f"{placed['sent_gb_per_step']:.1f}{remarks}"
        )
    return "\n".join(lines)


def metrics(
    shape: Shape, run: Training, sizes: Sizes, params: Params, others: dict[str, Scored]
) -> dict:
    """metrics/plan.json: the same on every machine.

    `cards` is a list, since DVC's tables and tools/compare.py skip lists: its ninety numbers would
    hide the important ones.
    """
    kept = KEPT[params.train.gradient_checkpointing]
    prediction = placement.predict(sizes, placement.resident(sizes, kept))
    every, by_card = placement.methods(shape, run), cards(sizes, kept, others)
    fits = [entry["card_gb"] for entry in by_card if entry["placed"]]
    parts = ("weights", "adapter", "optimizer", "activations", "logits", "overhead")
    return {
        "predicted_peak_vram_gb": prediction.peak / GB,
        "predicted_device_gb": prediction.device / GB,
        **{f"{part}_gb": getattr(prediction, part) / GB for part in parts},
        "full_finetune_gb": every["full"].device / GB,
        "lora_gb": every["lora"].device / GB,
        "qlora_gb": every["qlora"].device / GB,
        "smallest_gpu_gb": fits[0] if fits else None,
        "vram_limit_gb": params.plan.vram_limit_gb,
        "cards": by_card,
    } | ({"active_parameters": shape.active_parameters} if shape.experts else {})


def check_positions(config: PretrainedConfig, rows: Lengths) -> None:
    """Warn if a row is longer than the model's positions, which would silently train badly. Raise
    StageError if the model cannot compute it."""
    longest = max(rows.tokens)
    positions = positions_of(config)
    if positions and longest > positions:
        said = (
            f"the longest row has {longest:,} tokens, but the model supports {positions:,} "
            "(max_position_embeddings); lower prepare.max_length"
        )
        if config.get_text_config().model_type in TABLES:
            raise StageError(said)
        print(f"plan: warning: {said}")


def tell_experts(shape: Shape, run: Training) -> None:
    """Print the parameters of a mixture of experts: all, and those that compute a token."""
    if not shape.experts:
        return
    packed, at_once = expert_bytes(shape, run.method, run.double_quant), ""
    if run.method == "qlora" or shape.mxfp4:
        at_once = f", {2 * chunk_values(shape) / GB:.2f} GB of them dequantized at once"
    print(
        f"plan: {shape.active_parameters / 1e9:.3f}e9 of {shape.parameters / 1e9:.3f}e9 parameters "
        f"compute a token, {shape.chosen} of {shape.experts[0].count} experts a layer; experts "
        f"take {packed / GB:.2f} GB{at_once}"
    )


def tell_left_out(shape: Shape, targets: str | list[str]) -> None:
    """Say which Linears all-linear skips."""
    left = [linear.name for linear in shape.linears if not linear.adaptable]
    if left and targets == "all-linear":
        print(
            f"plan: lora.target_modules: all-linear leaves out {len(left)} layers such as "
            f"{left[0]}, where an adapter would have no effect or change which experts are chosen"
        )


def refuse_over_limit(
    config: PretrainedConfig, shape: Shape, params: Params, rows: Lengths, sizes: Sizes
) -> None:
    """Raise StageError if no placement stays below plan.vram_limit_gb."""
    limit, kept = params.plan.vram_limit_gb, KEPT[params.train.gradient_checkpointing]
    if limit is None or placement.choose(sizes, limit * GB, kept=kept):
        return
    needed = placement.predict(sizes, placement.tightest(sizes, kept)).device
    change = cheapest_change(config, shape, params, rows, limit * GB)
    raise StageError(
        f"training needs at least {needed / GB:.2f} GB, but plan.vram_limit_gb is "
        f"{limit:g}; {change}"
    )


def main() -> None:
    params = load_params()
    check_sums(TOKENIZER, "fetch_model")
    check_sums(PREPARED, "prepare")
    rows = read_lengths(PREPARED)
    check_new_rows(TOKENIZER, rows)
    config, shape = read_model(TOKENIZER, rows.vocabulary)
    check_token_ids(config, PREPARED, rows.trained)
    run = planned(config, shape, params, rows)
    sizes = sizes_of(shape, run)
    others = scoring_stages(shape, run, longest_held_out(PREPARED))
    found = metrics(shape, run, sizes, params, others)
    placed = placement.resident(sizes, KEPT[params.train.gradient_checkpointing])
    where = "this GPU" if torch.cuda.is_available() else "an NVIDIA GPU (none here)"
    print(f"plan: memory to train {len(rows.tokens)} rows on {where}, all weights on the card:")
    print(table(placement.predict(sizes, placed), run, shape, placed))
    print("plan: what fits on which card:")
    print(cards_table(found["cards"], shape.layers))
    print(further_gpus(sizes, placed))
    tell_experts(shape, run)
    check_positions(config, rows)
    tell_left_out(shape, params.lora.target_modules)
    refuse_over_limit(config, shape, params, rows, sizes)
    write_metrics(METRICS, found)
    write_text(VERDICT, "training may start\n")


if __name__ == "__main__":
    main()
