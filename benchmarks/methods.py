"""Memory and time of each method and strategy, measured at 7B shape on the same rows.

    python -m benchmarks.methods measure [PART ...]   # on one NVIDIA GPU of 140 GB
    python -m benchmarks.methods measure perplexity --default DIR
    python -m benchmarks.methods report               # anywhere: the tables and the picture

    loading     memory of each form of the weights right after loading, in bits a parameter
    methods     full fine-tuning, 16-bit LoRA and QLoRA: the widely copied table
    strategies  recipes/mistral-7b-fast.yaml, and the same with one strategy disabled
    perplexity  the same strategies on the default's real model and rows: DIR is a project in which
                fetch_model and prepare have run

Mistral-7B's shape with random weights: memory and time are realistic, perplexity would not be.
1,000 rows, log-normal in length like guanaco's (benchmarks/speed.py), four a step in `methods`,
with checkpointing; the longest rows form the first step, so that its peak is that of the epoch. The
time of an epoch is extrapolated from the measured rate. The paged optimizer always fits into free
GPU memory, since paging can hang a GPU.
Writes benchmarks/results/methods.json after every part, methods.md and methods.svg.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.random_models import build, config_of, scratch, tokenizer
from benchmarks.speed import random_rows, row_lengths
from benchmarks.vram import (
    LIBRARIES,
    OFFLOADED_BYTES,
    ROWS_A_STEP,
    Point,
    alone,
    peaks,
    prepare,
    version,
)
from stages.shared.fast_path import FastPath, choose_fast_path
from stages.shared.outputs import GB
from stages.shared.params import PARAMS, Params
from stages.shared.placement import Placement
from stages.shared.vram import CARDS_GB
from stages.shared.workload import shape_of

FOLDER = Path("benchmarks/results")
RESULTS = FOLDER / "methods.json"
SHAPE = "mistral-7b"
RANK = 64
ROWS = 1000
STEPS, WARM_STEPS = 20, 5
METHODS = {"full": "full fine-tuning, bf16", "lora": "LoRA, 16 bit", "qlora": "QLoRA, NF4"}
# Widely quoted without a source: GB for 7B.
QUOTED_GB = {"full": 56, "lora": 28, "qlora": 11}
LOADED = {"bf16": (False, True), "nf4": (True, False), "nf4, double quantization": (True, True)}

RECIPE = Path("recipes/mistral-7b-fast.yaml")
EVERYTHING = "everything on"
# Recomputation is one of the strategies, even if this card could keep the activations.
ALWAYS = {"train": {"gradient_checkpointing": True}, "tracking": {"report_to": "none"}}
# Rows a step when they are not packed: about as many tokens as in the recipe's two packs.
UNPACKED = {"train": {"batching": "shuffle", "batch_size": 10}}
PADDED = {"train": UNPACKED["train"] | {"attention": "sdpa"}}
PEFT_ONLY = ("fused_lora", "liger", "offload")
# Strategy: changed parameters, and disabled parts of the fast path; `offload` keeps the inputs of
# recomputed layers on the GPU.
STRATEGIES: dict[str, tuple[dict, tuple[str, ...]]] = {
    EVERYTHING: ({}, ()),
    "16-bit base": ({"quantize": {"type": "none"}}, ()),
    "no double quantization": ({"quantize": {"double_quant": False}}, ()),
    "no gradient checkpointing": ({"train": {"gradient_checkpointing": False}}, ("offload",)),
    "no fused LoRA": ({}, ("fused_lora",)),
    "no Liger kernels": ({}, ("liger",)),
    "no offloading": ({}, ("offload",)),
    "rows not packed": (UNPACKED, ()),
    "rows padded, SDPA attention": (PADDED, ()),
    "PEFT alone, rows padded": (PADDED, PEFT_ONLY),
    "paged AdamW": ({"train": {"optimizer": "paged_adamw_32bit"}}, ()),
}
PARTS = {
    "loading": [*LOADED],
    "methods": ["qlora", "lora", "full"],
    # Twice with everything on, to show the difference between equal runs.
    "strategies": [*STRATEGIES, EVERYTHING],
    "perplexity": [EVERYTHING, *STRATEGIES],
}
STRATEGY_STEPS, STRATEGY_WARM, STRATEGY_ROWS = 16, 4, 240
# Packs a step on the default's rows: about as many tokens as in 8 rows.
DEFAULT_PACKS, DEFAULT_ROWS = 3, 8


def dataset(rows: list[list[int]]):
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def timed_steps(trainer, steps: int, warm: int) -> dict[str, float]:
    """Train `steps` steps in the order of the rows; tokens and seconds after the first `warm`."""
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback

    marks, batches, collate = [], [], trainer.data_collator

    # Batches are prefetched, so the tokens of each step are counted separately.
    def noting(examples):
        batches.append(sum(len(example["input_ids"]) for example in examples))
        return collate(examples)

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            torch.cuda.synchronize()
            marks.append(time.monotonic())
            control.should_training_stop = state.global_step >= steps

    trainer.data_collator = noting
    trainer._get_train_sampler = lambda *args: SequentialSampler(trainer.train_dataset)
    trainer.add_callback(Clock())
    trainer.train()
    seconds = marks[-1] - marks[warm - 1]
    return {
        "tokens_per_second": sum(batches[warm : len(marks)]) / seconds,
        "seconds_per_step": seconds / (len(marks) - warm),
        "steps": len(marks),
    }


def measure_method(method: str, device: torch.device) -> dict:
    """Peak and time of one method on the same rows, including the longest."""
    chosen = longest_first(random_rows(ROWS), ROWS_A_STEP, (STEPS - 1) * ROWS_A_STEP)
    tokens = sum(map(len, chosen[:ROWS_A_STEP]))
    point = Point(SHAPE, method, RANK if method != "full" else 0, tokens)
    trainer, *path = prepare(point, device, dataset(chosen))
    rate = timed_steps(trainer, STEPS, WARM_STEPS)
    found = peaks(trainer)
    seconds = sum(row_lengths(ROWS)) / rate["tokens_per_second"]
    print(
        f"methods: {method}: {found['measured_gb']:.2f} GB, {seconds:.0f} s an epoch "
        f"({told(*path)})",
        flush=True,
    )
    return found | {
        "method": method,
        "longest_step_tokens": tokens,
        "tokens_per_second": rate["tokens_per_second"],
        "seconds_per_epoch": seconds,
        "fast_path": told(*path),
        "quoted_gb": QUOTED_GB[method],
        "cards_gb": [size for size in CARDS_GB if found["measured_device_gb"] <= size],
    }


def measure_loading(name: str, device: torch.device) -> dict:
    """Bytes on the device right after loading a model."""
    quantized, double_quant = LOADED[name]
    before = torch.cuda.memory_allocated()
    model = build(SHAPE, quantized, device, double_quant=double_quant)
    loaded = torch.cuda.memory_allocated() - before
    shape = shape_of(config_of(SHAPE))
    linear = sum(x.parameters for x in shape.linears)
    del model
    bits = (loaded - 2 * shape.other_parameters) * 8 / linear
    return {
        "weights": name,
        "loaded_gb": loaded / GB,
        "bits_per_quantized_parameter": bits,
        "constants_bits": bits - 4 if quantized else 0.0,
        "bits_per_parameter": loaded * 8 / shape.parameters,
    }


def longest_first(rows: list[list[int]], count: int, others: int) -> list[list[int]]:
    """The `count` longest of `rows`, then the first `others` of the rest.

    The first step is the largest: its peak is that of an epoch.
    """
    longest = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)[:count]
    rest = [row for i, row in enumerate(rows) if i not in longest]
    return [*(rows[i] for i in longest), *rest[:others]]


def with_changes(params: dict, changes: dict) -> Params:
    return Params.model_validate(
        {k: v | changes.get(k, {}) if isinstance(v, dict) else v for k, v in params.items()}
    )


def strategy_path(
    params: Params, config, tokens: int, device, off: tuple[str, ...]
) -> tuple[FastPath, Placement]:
    """The training path with parts disabled, and the placement for steps of `tokens`: all weights
    on the GPU, and all layers recomputed or none."""
    from stages.training.building import as_installed

    gpu, layers = device.type == "cuda", config.num_hidden_layers
    fast = as_installed(choose_fast_path(params, config, gpu), config)
    named: dict[str, Any] = dict.fromkeys(set(off) & vars(fast).keys(), False)
    fast = replace(fast, **named)
    if params.train.gradient_checkpointing is not True:
        return fast, Placement(layers, layers)
    large = 2 * config.hidden_size * layers * tokens >= OFFLOADED_BYTES
    return fast, Placement(offload=gpu and large and "offload" not in off)


def told(fast: FastPath, placed: Placement) -> str:
    return f"{fast}{', offload' * placed.offload}"


def measure_strategy(name: str, device: torch.device) -> dict:
    """Peak and rate of the recipe with one strategy switched off."""
    from stages.training.building import TrainingSet, build_trainer

    changes, off = STRATEGIES[name]
    params = with_changes(yaml.safe_load(RECIPE.read_text(encoding="utf-8")), ALWAYS)
    params = with_changes(params.model_dump(), changes)
    quantize, width = params.quantize, params.prepare.max_length
    # What the recipe decides by: its own two packs.
    fast, placed = strategy_path(params, config_of(SHAPE), 2 * width, device, off)
    nf4 = quantize.type == "nf4"
    model = build(SHAPE, nf4, device, fast.attention, quantize.double_quant)
    rows = random_rows(ROWS)[:STRATEGY_ROWS]
    rows = dataset(longest_first(rows, params.train.batch_size, len(rows)))
    data = TrainingSet(rows, tokenizer(), width)
    trainer = build_trainer(model, data, params, fast, placed, scratch())
    rate = timed_steps(trainer, STRATEGY_STEPS, STRATEGY_WARM)
    found = {"strategy": name} | rate | peaks(trainer)
    found["fast_path"] = told(fast, placed)
    found["tokens_per_step"] = found["tokens_per_second"] * found["seconds_per_step"]
    print(
        f"methods: {name}: {found['measured_gb']:.2f} GB, card {found['measured_device_gb']:.2f} "
        f"GB, {found['tokens_per_second']:.0f} tokens/s, {found['seconds_per_step']:.3f} s a step",
        flush=True,
    )
    return found


def measure_perplexity(name: str, project: Path, device: torch.device) -> dict:
    """Held-out perplexity of the default, trained with one strategy disabled.

    Scored as evaluate does: the saved adapter on its base, by plain PEFT layers.
    """
    from datasets import Dataset
    from transformers import AutoConfig, AutoTokenizer

    from stages.quantize import quantize
    from stages.shared.model import load_adapter, load_base
    from stages.shared.rows import read_rows
    from stages.shared.scoring import score
    from stages.training.building import TrainingSet, build_trainer

    changes, off = STRATEGIES[name]
    default = yaml.safe_load((project / PARAMS).read_text(encoding="utf-8"))
    on = {"gradient_checkpointing": True, "batching": "packing", "batch_size": DEFAULT_PACKS}
    changed = on | changes.get("train", {})
    if changed["batching"] != "packing":
        changed["batch_size"] = DEFAULT_ROWS
    params = with_changes(default, changes | {"train": changed})
    base, prepared = project / "models/base", project / "data/prepared"
    width = json.loads((prepared / "prepared.json").read_text(encoding="utf-8"))["max_length"]
    rows = Dataset.from_file(str(prepared / "train.arrow")).select_columns(["input_ids", "labels"])
    with tempfile.TemporaryDirectory() as folder:
        source, adapter = base, Path(folder) / "adapter"
        if params.quantize.type == "nf4":
            source = Path(folder) / "nf4"
            source.mkdir()
            quantize(base, source, params.quantize.double_quant)
        tokens = params.train.batch_size * width
        config = AutoConfig.from_pretrained(source)
        fast, placed = strategy_path(params, config, tokens, device, off)
        data = TrainingSet(rows, AutoTokenizer.from_pretrained(prepared / "tokenizer"), width)
        torch.manual_seed(params.seed)
        model = load_base(source, device, fast.attention)
        trainer = build_trainer(model, data, params, fast, placed, scratch())
        trainer.train()
        trainer.model.save_pretrained(str(adapter), save_embedding_layers=False)
        steps = trainer.state.global_step
        del trainer, model
        tuned = load_adapter(load_base(source, device), adapter)
        found = score(tuned, read_rows(prepared / "eval.arrow")).perplexity
    path = told(fast, placed)
    print(f"methods: {name}: perplexity {found:.4f} after {steps} steps ({path})", flush=True)
    return {"strategy": name, "perplexity": found, "steps": steps, "fast_path": path}


def measure_one(part: str, name: str, project: Path) -> tuple[dict, str]:
    """One row of a part, and the GPU that it was measured on."""
    from datasets import disable_caching

    disable_caching()
    device = torch.device("cuda", 0)
    if part == "perplexity":
        found = measure_perplexity(name, project, device)
    else:
        measures = {
            "loading": measure_loading,
            "methods": measure_method,
            "strategies": measure_strategy,
        }
        found = measures[part](name, device)
    return found, torch.cuda.get_device_name()


def measure(parts: list[str], project: Path) -> None:
    """Measure the parts and store each result immediately."""
    for part in parts:
        found = []
        for name in PARTS[part]:
            row, device = alone(measure_one, part, name, project)
            found.append(row)
            keep(part, found, device)


def keep(part: str, found: list[dict], device: str) -> None:
    """Put the results of one part into RESULTS."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results |= {
        "device": device,
        "versions": {name: version(name) for name in LIBRARIES},
        "shape": SHAPE,
        "rank": RANK,
        "rows": ROWS,
        "tokens": sum(row_lengths(ROWS)),
        "dates": results.get("dates", {}) | {part: datetime.now(UTC).date().isoformat()},
        part: found,
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def markdown(results: dict) -> str:
    """A table of each part that was measured."""
    lines = [
        f"7B shape, {results['rows']} rows of {results['tokens']} tokens, {ROWS_A_STEP} a step, "
        f"rank {results['rank']}, on {results['device']}, {max(results['dates'].values())}.",
        "",
        "| method | quoted | allocated | GPU memory needed | fits (GB) | 1,000 rows |",
        "|---|--:|--:|--:|---|--:|",
    ]
    for found in results.get("methods", []):
        cards = ", ".join(map(str, found["cards_gb"])) or "none of 80 or less"
        lines.append(
            f"| {METHODS[found['method']]} | ~{found['quoted_gb']} GB | {found['measured_gb']:.1f} "
            f"GB | {found['measured_device_gb']:.1f} GB | {cards} "
            f"| {found['seconds_per_epoch']:.0f} s |"
        )
    lines += ["", "| weights | after loading | bits a parameter | of a quantized one | constants |"]
    lines.append("|---|--:|--:|--:|--:|")
    for found in results.get("loading", []):
        lines.append(
            f"| {found['weights']} | {found['loaded_gb']:.2f} GB "
            f"| {found['bits_per_parameter']:.3f} | {found['bits_per_quantized_parameter']:.3f} "
            f"| {found['constants_bits']:.3f} |"
        )
    return "\n".join(lines + strategies_table(results)) + "\n"


def strategies_table(results: dict) -> list[str]:
    """Memory, rate and perplexity of each strategy."""
    if "strategies" not in results:
        return []
    perplexities: dict[str, list[str]] = {}
    for found in results.get("perplexity", []):
        perplexities.setdefault(found["strategy"], []).append(f"{found['perplexity']:.2f}")
    scored = results["dates"].get("perplexity", "not measured")
    lines = [
        "",
        "| strategy | allocated | of it managed | GPU memory needed | tokens/s | s a step "
        f"| perplexity of the default, {scored} |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for found in results["strategies"]:
        name = found["strategy"]
        lines.append(
            f"| {name} | {found['measured_gb']:.2f} GB | {found['managed_gb']:.2f} GB "
            f"| {found['measured_device_gb']:.2f} GB | {found['tokens_per_second']:.0f} "
            f"| {found['seconds_per_step']:.3f} "
            f"| {' and '.join(perplexities.get(name, ['not measured']))} |"
        )
    return lines


def picture(results: dict) -> str:
    """An SVG of bars: quoted and measured."""
    import vl_convert

    values = [
        {"method": METHODS[found["method"]], "what": what, "gb": found[field]}
        for found in results["methods"]
        for what, field in (("quoted", "quoted_gb"), ("measured", "measured_device_gb"))
    ]
    spec = {
        "width": 420,
        "height": 180,
        "background": "white",
        "data": {"values": values},
        "mark": "bar",
        "encoding": {
            "y": {"field": "method", "title": None, "sort": list(METHODS.values())},
            "yOffset": {"field": "what", "sort": ["quoted", "measured"]},
            "x": {"field": "gb", "type": "quantitative", "title": "GPU memory needed (GB)"},
            "color": {
                "field": "what",
                "title": None,
                "sort": ["quoted", "measured"],
                "scale": {"range": ["#b8bcc4", "#1f6feb"]},
            },
        },
    }
    return vl_convert.vegalite_to_svg(spec, vl_version="6.4")


def report() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    (FOLDER / "methods.md").write_text(markdown(results), encoding="utf-8")
    (FOLDER / "methods.svg").write_text(picture(results), encoding="utf-8")
    print(markdown(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    measuring.add_argument("--default", type=Path, default=Path("."), help="its project folder")
    commands.add_parser("report")
    options = parser.parse_args()
    if options.command == "report":
        report()
        return
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part is called {min(unknown)}; there are {', '.join(PARTS)}")
    measure(options.parts or list(PARTS)[:3], options.default)


if __name__ == "__main__":
    main()
