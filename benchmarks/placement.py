"""Placements on one NVIDIA GPU: streamed weights, kept activations, and predictions.

    python -m benchmarks.placement measure [NAME ...]   # points by name; all without one
    python -m benchmarks.placement report               # anywhere: predictions, errors, ratios

Random weights in known shapes, trained for a few steps by the train stage's trainer, each point in
its own process. `cap_gb` limits a point's memory; its placement is the one that training would
choose there, unless the point sets it. Writes benchmarks/results/placement.json after every point.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.cards import status
from benchmarks.random_models import SHAPES, build, config_of, scratch, tokenizer
from benchmarks.speed import RESULTS as SPEED
from benchmarks.vram import alone, peaks
from stages.shared import placement
from stages.shared.outputs import GB
from stages.shared.params import PARAMS, Params
from stages.shared.placement import Placement
from stages.shared.vram import Sizes, sizes_of
from stages.shared.workload import KEPT, Lengths, planned_training, shape_of

RESULTS = Path("benchmarks/results/placement.json")
STEPS, WARM = 8, 3


@dataclass(frozen=True)
class Point:
    """One setting. `checkpointing` is train.gradient_checkpointing; `streamed` and `dense` force a
    number of layers."""

    shape: str
    rank: int
    tokens: int
    rows: int = 2
    cap_gb: float | None = None
    checkpointing: bool | str = "auto"
    accumulation: int = 1
    optimizer: str = "adamw_torch_fused"
    quantize: str = "nf4"
    streamed: int | None = None
    dense: int | None = None
    steps: int = STEPS
    held_out: bool = True
    targets: str = "all-linear"
    experts: bool = False


ATTENTION = "q_proj,k_proj,v_proj,o_proj"
K = 1024
POINTS = {
    "70b resident 4096": Point("llama-2-70b", 16, 4 * K, checkpointing=True, steps=6),
    "70b 12 GB 4096": Point("llama-2-70b", 16, 4 * K, cap_gb=12, checkpointing=True, steps=6),
    "70b resident 2048": Point("llama-2-70b", 16, 2 * K, checkpointing=True, steps=6),
    "70b 12 GB 2048": Point("llama-2-70b", 16, 2 * K, cap_gb=12, checkpointing=True, steps=6),
    "70b 24 GB 4096": Point("llama-2-70b", 16, 4 * K, cap_gb=24, steps=6),
    "110b 24 GB": Point("qwen1.5-110b", 16, 4 * K, cap_gb=24, steps=6),
    "7b resident 4096": Point("mistral-7b", 64, 4 * K, checkpointing=True),
    "7b 6 GB 4096": Point("mistral-7b", 64, 4 * K, cap_gb=6, checkpointing=True),
    "7b 8 GB 8192": Point("mistral-7b", 64, 8 * K, rows=4, cap_gb=8),
    "7b 16 GB 4096": Point("mistral-7b", 64, 4 * K, cap_gb=16),
    "7b 24 GB 4096": Point("mistral-7b", 64, 4 * K, cap_gb=24, held_out=False),
    "7b 24 GB 8192": Point("mistral-7b", 64, 8 * K, rows=4, cap_gb=24, held_out=False),
    "7b 48 GB 8192": Point("mistral-7b", 64, 8 * K, rows=4, cap_gb=48),
    "7b 80 GB 16384": Point("mistral-7b", 64, 16 * K, rows=8, cap_gb=80),
    "7b whole 4096": Point("mistral-7b", 64, 4 * K),
    "7b whole 4096 in 4 bit": Point("mistral-7b", 64, 4 * K, dense=0),
    "7b whole 16384": Point("mistral-7b", 64, 16 * K, rows=8, held_out=False),
    "7b whole 16384 in 4 bit": Point("mistral-7b", 64, 16 * K, rows=8, dense=0, held_out=False),
    "7b whole 32768": Point("mistral-7b", 64, 32 * K, rows=16),
    "qwen7b 8192": Point("qwen2.5-7b", 16, 8 * K, checkpointing=False),
    "gemma 12b 4096": Point("gemma-3-12b", 16, 4 * K),
    "gemma 12b 24 GB 4096": Point("gemma-3-12b", 16, 4 * K, cap_gb=24),
    "8b one row of 65536": Point("llama-3-8b", 16, 64 * K, rows=1, cap_gb=24, steps=4),
    "7b 16 bit 12 GB": Point("mistral-7b", 16, 4 * K, cap_gb=12, quantize="none"),
    # The rows of gpt-oss are short: its attention has sinks, which eager attention alone knows.
    "30b a3b resident": Point("qwen-3-30b-a3b", 16, 4 * K, targets=ATTENTION),
    "30b a3b 24 GB": Point("qwen-3-30b-a3b", 16, 4 * K, cap_gb=24, targets=ATTENTION),
    "30b a3b 8 GB": Point("qwen-3-30b-a3b", 16, 4 * K, cap_gb=8, targets=ATTENTION),
    "30b a3b recomputed": Point("qwen-3-30b-a3b", 16, 4 * K, checkpointing=True, targets=ATTENTION),
    "30b a3b experts": Point("qwen-3-30b-a3b", 16, 4 * K, targets=ATTENTION, experts=True),
    "gpt-oss 20b resident": Point("gpt-oss-20b", 16, 4 * K, rows=8, targets=ATTENTION),
    "gpt-oss 20b 12 GB": Point("gpt-oss-20b", 16, 4 * K, rows=8, cap_gb=12, targets=ATTENTION),
    "gpt-oss 20b 8 GB": Point("gpt-oss-20b", 16, 2 * K, rows=8, cap_gb=8, targets=ATTENTION),
    # Families whose layers are not computed in halves.
    "phi3 mini": Point("phi-3-mini", 32, 8 * K),
    "phi3 mini recomputed": Point("phi-3-mini", 32, 8 * K, checkpointing=True),
    "starcoder2 7b": Point("starcoder2-7b", 64, 6 * K),
    "starcoder2 7b recomputed": Point("starcoder2-7b", 64, 6 * K, checkpointing=True),
    "7b paged 8 GB": Point("mistral-7b", 64, 4 * K, cap_gb=8, optimizer="paged_adamw_32bit"),
}


def params_of(point: Point) -> Params:
    """params.yaml with the settings of `point`."""
    params = yaml.safe_load(PARAMS.read_text(encoding="utf-8"))
    params["quantize"]["type"] = point.quantize
    targets = point.targets if point.targets == "all-linear" else point.targets.split(",")
    params["lora"] |= {"r": point.rank, "alpha": point.rank, "dropout": 0.0}
    params["lora"] |= {"target_modules": targets, "experts": point.experts}
    params["train"] |= {
        "epochs": 1.0,
        "batch_size": point.rows,
        "gradient_accumulation": point.accumulation,
        "optimizer": point.optimizer,
        "gradient_checkpointing": point.checkpointing,
        "batching": "shuffle",
        "learning_rate": 1.0e-5,
    }
    return Params.model_validate(params)


def lengths_of(point: Point) -> Lengths:
    count = point.steps * point.rows * point.accumulation
    each = [point.tokens // point.rows] * count
    return Lengths(each, each, max(each))


def sizes_for(point: Point) -> Sizes:
    config = config_of(point.shape)
    shape, rows, nf4 = shape_of(config), lengths_of(point), point.quantize == "nf4"
    return sizes_of(shape, planned_training(config, shape, params_of(point), rows, nf4, nf4))


def placed_for(point: Point, sizes: Sizes, budget: float, rates: placement.Rates) -> Placement:
    kept = KEPT[point.checkpointing]
    found = placement.choose(sizes, budget, rates=rates, kept=kept)
    found = found or placement.tightest(sizes, kept)
    if point.streamed is not None:
        found = replace(found, streamed=point.streamed, dense=0)
    return found if point.dense is None else replace(found, dense=point.dense)


def measure_point(name: str, *callbacks: Any) -> tuple[dict, dict]:
    """Train a few steps. Returns the point with its measurements, and the environment."""
    from datasets import Dataset, disable_caching
    from transformers import TrainerCallback

    from benchmarks.speed import versions
    from stages.shared.card import card_budget, hold_to
    from stages.shared.device import pick_device
    from stages.shared.fast_path import choose_fast_path
    from stages.shared.streaming import stream_layers
    from stages.training.building import TrainingSet, as_installed, build_trainer
    from stages.training.placing import measured_rates

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds = []

        def on_step_begin(self, *args, **kwargs):
            torch.cuda.synchronize()
            self.began = time.monotonic()

        def on_step_end(self, *args, **kwargs):
            torch.cuda.synchronize()
            self.seconds.append(time.monotonic() - self.began)

    disable_caching()
    point, device, started = POINTS[name], pick_device(), time.monotonic()
    sizes, rates = sizes_for(point), measured_rates(device)
    budget = card_budget() if point.cap_gb is None else point.cap_gb * GB
    placed = placed_for(point, sizes, budget, rates)
    draw, rows = random.Random(0), lengths_of(point).tokens
    vocabulary = range(3, SHAPES[point.shape].vocabulary)
    data = Dataset.from_dict({k: [draw.choices(vocabulary, k=n) for n in rows] for k in ("ids",)})
    data = data.rename_column("ids", "input_ids")
    data = data.add_column("labels", data["input_ids"])
    params, config = params_of(point), config_of(point.shape)
    fast = as_installed(choose_fast_path(params, config, gpu=True), config)
    where = torch.device("cpu") if placed.streamed else device
    # The generator of a GPU has another seed in every process.
    torch.manual_seed(0)
    model = build(point.shape, point.quantize == "nf4", where, fast.attention)
    streamer = stream_layers(model, device, placed.streamed) if placed.streamed else None
    torch.cuda.empty_cache()
    if point.cap_gb is not None:
        hold_to(point.cap_gb * GB)
    trainer = build_trainer(
        model,
        TrainingSet(data, tokenizer(), max(rows)),
        params,
        fast,
        placed,
        scratch(),
        streamer=streamer,
    )
    clock = Clock()
    for callback in (clock, *callbacks):
        trainer.add_callback(callback)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    built = time.monotonic() - started
    trainer.train()
    found = peaks(trainer)
    shutil.rmtree(str(trainer.args.output_dir), ignore_errors=True)
    tokens, steady = point.tokens * point.accumulation, statistics.median(clock.seconds[WARM:])
    found |= {
        "tokens_per_second": tokens * len(clock.seconds) / sum(clock.seconds),
        "steady_tokens_per_second": tokens / steady,
        "measured_ram_gb": (status("RssAnon") + status("RssShmem")) / GB,
        "host_copy_gb": streamer.source.host_bytes / GB if streamer else 0.0,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "built_seconds": built,
        "fast_path": str(fast),
        # Of this GPU, in this minute.
        "tflops": rates.operations / 1e12,
    }
    print(
        f"placement: {name}: {placed}: {found['steady_tokens_per_second']:.0f} tokens/s, "
        f"{found['measured_gb']:.2f} GB, card {found['measured_device_gb']:.2f} GB, host "
        f"{found['measured_ram_gb']:.1f} GB (predicted "
        f"{placement.predict(sizes, placed).peak / GB:.2f}, "
        f"{placement.predict(sizes, placed).device / GB:.2f}, "
        f"{placement.predict(sizes, placed).host / GB:.1f}; built in {built:.0f} s)",
        flush=True,
    )
    return {"name": name} | asdict(point) | {"placement": asdict(placed)} | found, {
        "device": torch.cuda.get_device_name(),
        "device_uuid": str(torch.cuda.get_device_properties(0).uuid),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
        "bus_gb_per_second": rates.bus / GB,
    }


def measure(names: list[str]) -> None:
    """Measure the points and put them into RESULTS, replacing older ones."""
    saved = load()
    for name in names or POINTS:
        try:
            found, where = alone(measure_point, name)
        except torch.cuda.OutOfMemoryError as error:
            print(f"placement: {name}: does not fit: {str(error).splitlines()[0]}", flush=True)
            continue
        saved["points"] = [p for p in saved["points"] if p["name"] != name] + [found]
        saved |= where
        RESULTS.write_text(json.dumps(with_predictions(saved), indent=1) + "\n", encoding="utf-8")


def load() -> dict:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"points": []}


def with_predictions(results: dict) -> dict:
    """The points with current predictions of stages/shared/placement.py, and the ratios."""
    for found in results["points"]:
        fields = {key: found[key] for key in Point.__dataclass_fields__ if key in found}
        sizes, placed = sizes_for(Point(**fields)), Placement(**found["placement"])
        prediction = placement.predict(sizes, placed)
        found |= {
            "tokens_per_step": found["tokens"] * found["accumulation"],
            "streamed_layers": placed.streamed,
            "kept_layers": min(placed.kept_mlp, placed.kept_attention),
        }
        found["predicted_gb"] = prediction.peak / GB
        found["predicted_device_gb"] = prediction.device / GB
        found["predicted_ram_gb"] = prediction.host / GB
        # Of the time of a step, what its operations take at the rate of a square product.
        computing = placement.operations(sizes, placed) / (found["tflops"] * 1e12)
        steps = found["steady_tokens_per_second"] / found["tokens"]
        found["share_of_operations"] = computing * steps
    return results | {"ratios": ratios(results["points"])}


def ratios(points: list[dict]) -> dict[str, float]:
    rate = {point["name"]: point["steady_tokens_per_second"] for point in points}
    pairs = {
        "70b_4096_12gb": ("70b 12 GB 4096", "70b resident 4096"),
        "70b_2048_12gb": ("70b 12 GB 2048", "70b resident 2048"),
        "7b_4096_6gb": ("7b 6 GB 4096", "7b resident 4096"),
        "dense_4096": ("7b whole 4096", "7b whole 4096 in 4 bit"),
        "dense_16384": ("7b whole 16384", "7b whole 16384 in 4 bit"),
    }
    found = {k: rate[a] / rate[b] for k, (a, b) in pairs.items() if a in rate and b in rate}
    whole = [rate[name] for name in rate if name.startswith("7b whole")]
    if whole:
        found["share_of_26000"] = max(whole) / 26_000
    if "qwen7b 8192" in rate:
        found["qwen7b_tokens_per_second"] = rate["qwen7b 8192"]
    sides = json.loads(SPEED.read_text(encoding="utf-8"))["ratios"]
    for gb in (24, 48, 80):
        for suffix, key in (("", "steady_ratio"), ("_epoch", "ratio")):
            if against := [pair[key] for pair in sides if pair["sides"][0] == f"ours-{gb}"]:
                # Against the fastest of its ways.
                found[f"{gb}gb_vs_unsloth{suffix}"] = min(against)
    return found


def report() -> None:
    results = with_predictions(load())
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(
        "point                  streamed kept tokens/s  GPU GB (error)  card (error)  host (error)"
    )
    for p in results["points"]:
        pairs = [(p[f"measured_{k}"], p[f"predicted_{k}"]) for k in ("gb", "device_gb", "ram_gb")]
        errors = [f"{m:.2f} ({100 * (expected / m - 1):+.1f} %)" for m, expected in pairs]
        kept = f"{p['placement']['kept_mlp']}/{p['placement']['kept_attention']}"
        print(
            f"{p['name']:<22} {p['streamed_layers']:>8} {kept:>6} "
            f"{p['steady_tokens_per_second']:>8.0f}  {'  '.join(errors)}"
        )
    for name, value in results["ratios"].items():
        print(f"{name}: {value:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["measure", "report"])
    parser.add_argument("names", nargs="*", metavar="NAME")
    arguments = parser.parse_args()
    # As in every stage: reserved memory stays close to allocated memory.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if arguments.action == "measure":
        measure(arguments.names)
    else:
        report()


if __name__ == "__main__":
    main()
