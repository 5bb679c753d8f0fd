"""Decide whether the merged model may be shipped: compare it with the base plus adapter.

    python -m stages.verify

Reads models/merged, models/quantized, models/base, models/adapter and data/prepared. Writes
models/verify.ok and metrics/verify.json, and only when every check has passed:
- tensor names, shapes and types are the base's and `merge.dtype`, and so is config.json;
- every tensor is what PEFT itself computes for it, within one rounding;
- transformers loads the folder with no key missing or left over; its tokenizer renders and splits
  the held-out texts as that of the rows does, and its generation ends where an answer does;
- on the held-out rows perplexity is within `verify.max_perplexity_change_percent` of the base
  with the adapter, and no value overflows.
"""

import gc
import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from stages.shared.libraries import load_libraries
from stages.shared.outputs import check_sums, write_metrics, write_text
from stages.shared.params import load_params
from stages.shared.process import StageError, begin

if __name__ == "__main__":
    begin("verify")
    load_libraries("bitsandbytes", "peft")

import torch

from stages.shared.adapter import Change, check_adapter_sums, read_adapter, rows_needed
from stages.shared.device import pick_device
from stages.shared.embeddings import extend, has_own_head
from stages.shared.launch import on_devices
from stages.shared.merging import merged_rows
from stages.shared.model import load_adapter
from stages.shared.paths import ADAPTER, BASE, MERGED, PREPARED, QUANTIZED
from stages.shared.ranks import ALONE, World
from stages.shared.rows import read_rows
from stages.shared.scored_model import load_to_score, model_sizes
from stages.shared.scoring import batch_count
from stages.shared.sets import held_out_sets
from stages.shared.streaming import Streamer
from stages.shared.weights import Weights, kept_names, model_weights, other_names
from stages.verifying.agreement import Reference, agreement, reference
from stages.verifying.folder_check import check_companions, check_headers, check_record
from stages.verifying.merged_model import check_whole, place_merged, watched_activations
from stages.verifying.tensor_check import check_tensors
from stages.verifying.tokenizer_check import check_tokenizer

VERDICT = Path("models/verify.ok")
METRICS = Path("metrics/verify.json")
FLOAT16_MAX = 65504


def check_inputs(params) -> list[dict]:
    """Everything that files tell before a model is loaded. Returns the held-out rows.

    Raises StageError.
    """
    # What is damaged on disk is told apart from what was merged wrong: the remedies differ.
    made = {BASE: "fetch_model", QUANTIZED: "quantize", PREPARED: "prepare", MERGED: "merge"}
    for folder, stage in made.items():
        check_sums(folder, stage)
    check_adapter_sums(ADAPTER)
    check_record(MERGED, ADAPTER, params.merge.base, params.merge.dtype)
    vocabulary, own_head = rows_needed(ADAPTER), has_own_head(BASE, QUANTIZED)
    check_companions(MERGED, BASE, params.merge.dtype, vocabulary, own_head)
    rows = read_rows(held_out_sets()[""])
    check_tokenizer(MERGED, PREPARED / "tokenizer", ADAPTER, rows)
    return rows


def scores(model, rows: list[dict], ref: Reference, streamer: Streamer | None = None) -> dict:
    """Metrics of the merged model against the reference."""
    with watched_activations(model) as largest:
        found = agreement(model, rows, ref, streamer)
    return {
        "merged_perplexity": found.perplexity,
        "adapter_perplexity": ref.perplexity,
        "perplexity_change_percent": 100 * (found.perplexity / ref.perplexity - 1),
        "mean_kl": found.mean_kl,
        "max_kl": found.max_kl,
        "kl_tokens": found.kl_tokens,
        "token_agreement": found.token_agreement,
        "nonfinite_values": found.nonfinite,
        "max_activation": max(ref.world.gather(float(largest)), key=_with_nan),
    }


def _with_nan(value: float) -> float:
    """The larger activation; NaN counts as the largest."""
    return math.inf if math.isnan(value) else value


def merge_onto(source: Weights, updates: dict[str, Change], dtype, device: torch.device):
    """A function that gives the weights of the merge on `source` for those of another merge."""
    kept = kept_names(QUANTIZED)

    def merged(name: str, stored: torch.Tensor) -> torch.Tensor:
        # None are of an output head that is tied to the embeddings.
        parts = [part for part in source.parts(name) if part not in kept]
        blocks = (
            block.values.to(stored.device)
            for part in parts
            for block in merged_rows(source, part, updates.get(part), dtype, device)
        )
        return torch.cat([x.flatten() for x in blocks]).view(stored.shape) if parts else stored

    return merged


def other_scores(model, rows: list[dict], ref: Reference, streamer: Streamer | None = None) -> dict:
    """Metrics of another merge, in the place of the merged model."""
    found = agreement(model, rows, ref, streamer)
    if found.nonfinite:
        print("verify: the merge on the other base overflows merge.dtype")
        return {}
    return {"other_base_perplexity": found.perplexity, "other_base_mean_kl": found.mean_kl}


def check_scores(metrics: dict, limit: float, dtype: str) -> None:
    """Raise StageError, with the numbers, when the merged model does not predict as the adapter."""
    faults = []
    if metrics["nonfinite_values"]:
        faults.append(f"{metrics['nonfinite_values']} predicted values are NaN or infinite")
    if dtype == "float16" and not metrics["max_activation"] <= FLOAT16_MAX:
        faults.append(
            f"an activation of {metrics['max_activation']:.3g} exceeds float16's {FLOAT16_MAX}; "
            "set merge.dtype: bfloat16"
        )
    if not abs(metrics["perplexity_change_percent"]) <= limit:
        faults.append(
            f"perplexity {metrics['merged_perplexity']:.4f} and with the adapter "
            f"{metrics['adapter_perplexity']:.4f}: {metrics['perplexity_change_percent']:+.2f} % "
            f"(allowed {limit:g} %), mean KL {metrics['mean_kl']:.2g}, top-1 agreement "
            f"{metrics['token_agreement']:.2%}; use merge.base: dequantized, or allow more in "
            "verify.max_perplexity_change_percent"
        )
    if faults:
        raise StageError(f"{MERGED} must not be shipped: {'; '.join(faults)}")


def verify(params, rows: list[dict], device: torch.device, world: World = ALONE) -> dict:
    """All that needs a model, cheapest first, shared by the ranks of `world`.

    Returns the metrics; raises StageError.
    """
    dtype = getattr(torch, params.merge.dtype)
    renamed = other_names(QUANTIZED)
    merged, base = Weights(MERGED, renamed), Weights(BASE, renamed)
    quantized = model_weights(QUANTIZED)
    # Named here what PEFT would load in part or fail on.
    updates = read_adapter(ADAPTER, quantized.shapes, QUANTIZED)
    check_headers(merged, quantized, base, dtype, updates)
    source, other = (quantized, base) if params.merge.base == "dequantized" else (base, quantized)
    with tempfile.TemporaryFile(dir=MERGED.parent) as cache:
        longest = max(len(row["input_ids"]) for row in rows)
        sizes = model_sizes(QUANTIZED, longest, device, ADAPTER)
        base_model, streamer = load_to_score("verify", QUANTIZED, sizes, device, world)
        extend(base_model, rows_needed(ADAPTER))
        model: Any = load_adapter(base_model, ADAPTER)
        copied = kept_names(QUANTIZED) | (set(merged.names) - set(quantized.names))
        check_tensors(merged, model, source, base, dtype, device, world, streamer, copied)
        ref = reference(model, rows, cache, world, streamer)
        # Only one of the models is in memory at a time.
        del base_model, model, streamer
        free_memory()
        if renamed is not None:
            check_whole(MERGED)
        sizes = model_sizes(QUANTIZED, longest, device, dense=True)
        place = partial(place_merged, MERGED, sizes, device, world, renamed)
        model, streamer = place()
        metrics = scores(model, rows, ref, streamer)
        if params.verify.compare_bases and quantized.nf4:
            del model, streamer
            free_memory()
            weight_of = merge_onto(other, updates, dtype, device)
            model, streamer = place(make=weight_of)
            metrics |= other_scores(model, rows, ref, streamer)
    check_scores(metrics, params.verify.max_perplexity_change_percent, params.merge.dtype)
    return metrics


def free_memory() -> None:
    """Free the memory of models that are no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compare(world: World, task: dict) -> dict:
    """`verify` in a rank of `world`, or alone. Returns the metrics."""
    device = pick_device()
    rows = read_rows(held_out_sets()[""])
    where = str(device) + (f", {world.size} ranks" if world.size > 1 else "")
    print(
        f"verify: {MERGED} against {QUANTIZED} + {ADAPTER}, {len(rows)} rows, on {where}",
        flush=True,
    )
    return verify(load_params(), rows, device, world)


def main() -> None:
    metrics = on_devices("verify", compare, batch_count(check_inputs(load_params())))
    write_metrics(METRICS, metrics)
    write_text(VERDICT, "verified\n")
    print(
        f"verify: passed: perplexity {metrics['merged_perplexity']:.4f} "
        f"({metrics['perplexity_change_percent']:+.3f} %), mean KL {metrics['mean_kl']:.2g}, "
        f"top-1 agreement {metrics['token_agreement']:.2%}"
    )


if __name__ == "__main__":
    main()
