"""Measured GPU memory of training against the predictions of `plan`.

    python -m benchmarks.vram measure --only fit        # on one NVIDIA GPU of 140 GB
    python -m benchmarks.vram fit                       # anywhere: the constants of placement.py
    python -m benchmarks.vram measure --only held-out   # after the constants are committed
    python -m benchmarks.vram report                    # anywhere: predictions, errors, a table

Random weights in the shapes of known models (benchmarks/random_models.py), trained for a few steps
by the train stage's trainer. A point's `measured_gb` is the allocator's peak plus the managed
memory of a paged optimizer; `measured_device_gb` is all memory used on the card: the allocator's
reservation, managed memory, and the driver's (context, kernels).
Writes benchmarks/results/plan.json.
"""

import argparse
import contextlib
import importlib.metadata
import json
import multiprocessing
import random
import shutil
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
import yaml

from benchmarks.random_models import SHAPES, build, config_of, scratch, tokenizer
from stages.shared import placement
from stages.shared.decoder_shape import Shape, Training
from stages.shared.fast_path import choose_fast_path
from stages.shared.outputs import GB
from stages.shared.params import PARAMS, Params
from stages.shared.placement import Placement
from stages.shared.workload import match_targets, shape_of

RESULTS = Path("benchmarks/results/plan.json")
STEPS = 3
ROWS_A_STEP = 4
# Inputs of this size or more are offloaded, unless a point says otherwise.
OFFLOADED_BYTES = 1e9
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "liger-kernel")


@dataclass(frozen=True)
class Point:
    """One setting. `offloading` None leaves the choice to the trainer, as in a real run."""

    shape: str
    method: str
    rank: int
    tokens_per_step: int
    checkpointing: bool = True
    dropout: float = 0.0
    optimizer: str = "adamw_torch_fused"
    offloading: bool | None = None
    attention: str = "auto"
    targets: str = "all-linear"
    accumulation: int = 1
    held_out: bool = True


ATTENTION = "q_proj,k_proj,v_proj,o_proj"
K = 1024
POINTS = [
    # Six to fit the constants of stages/shared/placement.py on.
    Point("mistral-7b", "qlora", 64, 2 * K, held_out=False),
    Point("mistral-7b", "qlora", 8, 8 * K, held_out=False),
    Point("qwen2-1.5b", "qlora", 64, 8 * K, checkpointing=False, held_out=False),
    Point("mistral-7b", "lora", 64, 8 * K, dropout=0.1, held_out=False),
    Point("llama-2-13b", "qlora", 64, 8 * K, held_out=False),
    Point("mistral-7b", "full", 0, 2 * K, held_out=False),
    # Never used for fitting.
    Point("qwen2-1.5b", "qlora", 8, 2 * K),
    Point("qwen2-1.5b", "qlora", 256, 16 * K),
    Point("qwen2-1.5b", "qlora", 64, 2 * K, checkpointing=False, dropout=0.1),
    Point("qwen2-1.5b", "lora", 64, 16 * K, offloading=False),
    Point("qwen2-1.5b", "full", 0, 8 * K),
    Point("mistral-7b", "qlora", 64, 2 * K, checkpointing=False),
    Point("mistral-7b", "qlora", 64, 8 * K, dropout=0.1),
    Point("mistral-7b", "qlora", 64, 8 * K, offloading=False),
    Point("mistral-7b", "qlora", 64, 16 * K),
    Point("mistral-7b", "qlora", 64, 8 * K, attention="sdpa"),
    Point("mistral-7b", "qlora", 16, 2 * K, dropout=0.05, targets="q_proj,v_proj"),
    Point("mistral-7b", "qlora", 64, 2 * K, accumulation=2),
    Point("mistral-7b", "lora", 8, 8 * K),
    Point("mistral-7b", "full", 0, 8 * K),
    Point("llama-2-13b", "qlora", 8, 2 * K),
    Point("llama-2-13b", "qlora", 64, 2 * K, checkpointing=False),
    Point("llama-2-13b", "qlora", 64, 16 * K),
    Point("llama-2-13b", "lora", 256, 8 * K),
    Point("gemma-3-12b", "qlora", 16, 4 * K),
    Point("llama-2-70b", "qlora", 8, 2 * K),
    Point("llama-2-70b", "qlora", 64, 8 * K),
    Point("qwen-3-30b-a3b", "qlora", 16, 4 * K, targets=ATTENTION),
    Point("gpt-oss-20b", "qlora", 16, 4 * K, targets=ATTENTION),
    Point("mistral-7b", "qlora", 64, 2 * K, optimizer="paged_adamw_32bit"),
    Point("mistral-7b", "qlora", 256, 2 * K, optimizer="paged_adamw_32bit"),
    Point("mistral-7b", "qlora", 256, 8 * K, optimizer="paged_adamw_8bit"),
]


def params_of(point: Point) -> Params:
    """params.yaml with the settings of `point`."""
    params = yaml.safe_load(PARAMS.read_text(encoding="utf-8"))
    params["quantize"] |= {"type": "nf4" if point.method == "qlora" else "none"}
    targets = point.targets if point.targets == "all-linear" else point.targets.split(",")
    params["lora"] |= {
        "r": max(1, point.rank),
        "alpha": max(1, point.rank),
        "dropout": point.dropout,
        "target_modules": targets,
    }
    params["train"] |= {
        "epochs": 1.0,
        "batch_size": ROWS_A_STEP,
        "gradient_accumulation": point.accumulation,
        "optimizer": point.optimizer,
        "gradient_checkpointing": point.checkpointing,
        "batching": "shuffle",
        "attention": point.attention,
        "learning_rate": 1.0e-5,
    }
    return Params.model_validate(params)


def random_rows(point: Point, steps: int):
    """`steps` steps of rows with the point's tokens in total, each slightly shorter than the one
    before, so that a padded batch has a mask."""
    from datasets import Dataset

    draw, rows = random.Random(0), []
    for index in range(steps * point.accumulation * ROWS_A_STEP):
        length = point.tokens_per_step // ROWS_A_STEP - (index if point.attention == "sdpa" else 0)
        rows.append(draw.choices(range(3, SHAPES[point.shape].vocabulary), k=length))
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def full_trainer(model, rows, params: Params, folder: Path, fast, placed: Placement):
    """Full fine-tuning: all weights and moments in bf16."""
    from trl import SFTConfig

    from stages.training.adjusting import apply_liger
    from stages.training.trainer import Trainer

    for parameter in model.parameters():
        parameter.requires_grad_(True)
    gpu = model.device.type == "cuda"
    if fast.liger:
        apply_liger(model)
    args = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=params.train.batch_size,
        learning_rate=params.train.learning_rate,
        optim="adamw_torch_fused",
        gradient_checkpointing=placed.kept_mlp == 0,
        activation_offloading=placed.offload,
        padding_free=fast.padding_free,
        max_length=None,
        bf16=gpu,
        use_cpu=not gpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return Trainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer())


def prepare(point: Point, device: torch.device, rows):
    """(trainer, fast path, placement) for `point`."""
    from stages.training.building import TrainingSet, as_installed, build_trainer

    params, config = params_of(point), config_of(point.shape)
    fast = as_installed(choose_fast_path(params, config, device.type == "cuda"), config)
    model = build(point.shape, point.method == "qlora", device, fast.attention)
    kept = 0 if point.checkpointing else config.num_hidden_layers
    placed = Placement(kept, kept, offload=offloads(point, device))
    folder = scratch()
    if point.method == "full":
        fast = replace(fast, fused_lora=False)
        return full_trainer(model, rows, params, folder, fast, placed), fast, placed
    data = TrainingSet(rows, tokenizer(), point.tokens_per_step)
    return build_trainer(model, data, params, fast, placed, folder), fast, placed


def offloads(point: Point, device: torch.device) -> bool:
    """Whether layer inputs are offloaded: as the point says, or depending on their size."""
    shape = SHAPES[point.shape]
    kept = 2 * shape.hidden * shape.layers * point.tokens_per_step
    wanted = kept >= OFFLOADED_BYTES if point.offloading is None else point.offloading
    return device.type == "cuda" and point.checkpointing and wanted


def training_of(point: Point, fast: dict) -> tuple[Shape, Training]:
    """The inputs of `predict` for a measured point."""
    shape = shape_of(config_of(point.shape))
    padded = not fast["padding_free"]
    targets = point.targets if point.targets == "all-linear" else point.targets.split(",")
    return shape, Training(
        method=point.method,
        double_quant=True,
        rank=point.rank,
        targets=match_targets(shape, targets),
        dropout=point.dropout,
        optimizer=point.optimizer,
        rows=ROWS_A_STEP if padded else 1,
        sequences=ROWS_A_STEP,
        tokens=point.tokens_per_step,
        learned_tokens=point.tokens_per_step,
        accumulation=point.accumulation,
        checkpointing=point.checkpointing,
        offloading=fast["offload"],
        attention=fast["attention"] if padded else "varlen",
        liger=fast["liger"],
        fused_lora=fast["fused_lora"],
    )


def alone(function, *args):
    """The result of `function` in its own process.

    A process's context grows with every loaded kernel, bitsandbytes frees managed memory only at
    exit, and Liger's replacements are permanent.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def peaks(trainer) -> dict[str, float]:
    """Peaks of this process in GB; nothing else may run on its GPU."""
    from stages.training.paged import state_bytes

    torch.cuda.synchronize()
    managed = state_bytes(trainer.optimizer)[1]
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved() - managed
    allocated, held = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {
        "allocated_gb": allocated / GB,
        "managed_gb": managed / GB,
        "reserved_gb": held / GB,
        "context_gb": context / GB,
        "measured_gb": (allocated + managed) / GB,
        "measured_device_gb": (held + managed + context) / GB,
    }


def measure_point(point: Point) -> tuple[dict, dict]:
    """Train a few steps. Returns the point with its measurements, and the environment."""
    from datasets import disable_caching

    disable_caching()
    started = time.monotonic()
    trainer, fast, placed = prepare(point, torch.device("cuda", 0), random_rows(point, STEPS))
    built = time.monotonic() - started
    trainer.train()
    found = peaks(trainer)
    shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
    print(
        f"vram: {point.shape} {point.method} r={point.rank} {point.tokens_per_step} tokens: "
        f"{found['measured_gb']:.2f} GB, card {found['measured_device_gb']:.2f} GB "
        f"(built in {built:.0f} s, trained in {time.monotonic() - started - built:.0f} s; {fast})",
        flush=True,
    )
    allocator = torch.cuda.memory._snapshot()["allocator_settings"]
    used = asdict(fast) | {"offload": placed.offload}
    return asdict(point) | {"fast": used} | found, {
        "device": torch.cuda.get_device_name(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in LIBRARIES},
        "expandable_segments": allocator["expandable_segments"],
    }


def measure(only: str, shapes: list[str]) -> None:
    """Measure the chosen points and put them into RESULTS, replacing older ones."""
    wanted = {"fit": (False,), "held-out": (True,), "all": (False, True)}[only]
    saved = load()
    for point in POINTS:
        if point.held_out not in wanted or (shapes and point.shape not in shapes):
            continue
        try:
            found, where = alone(measure_point, point)
        except torch.cuda.OutOfMemoryError as error:
            print(f"vram: {point}: does not fit this card: {str(error).splitlines()[0]}")
            continue
        same = [p for p in saved["points"] if key(p) == key(found)]
        saved["points"] = [p for p in saved["points"] if p not in same] + [found]
        save(saved | where)


def version(name: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return "not installed"


def key(point: dict) -> dict:
    """The fields that identify a point."""
    return {name: point[name] for name in Point.__dataclass_fields__ if name != "held_out"}


def load() -> dict:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"points": []}


def save(results: dict) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def measured_training(point: dict) -> tuple[Shape, Training]:
    """`training_of` for a point of RESULTS."""
    fields = {name: point[name] for name in Point.__dataclass_fields__}
    return training_of(Point(**fields), point["fast"])


def predicted(point: dict) -> placement.Prediction:
    """`plan`'s prediction for a measured point."""
    return placement.predict_run(*measured_training(point))


def fit() -> None:
    """Print the constants fitted to the fit points, to copy into stages/shared/placement.py."""
    points = [p for p in load()["points"] if not p["held_out"]]
    if not points:
        raise SystemExit("vram: no fit points in benchmarks/results/plan.json; measure them first")
    workspaces = statistics.median(
        p["measured_gb"] * GB - predicted(p).peak + placement.WORKSPACES for p in points
    )
    placement.WORKSPACES = workspaces
    without, offloading = (
        statistics.median(p["context_gb"] for p in points if p["fast"]["offload"] == on) * GB
        for on in (False, True)
    )
    placement.CONTEXT, placement.OFFLOADING_CONTEXT = without, offloading - without
    errors = {}
    for hundredth in range(0, 201, 5):
        placement.FRAGMENTATION = hundredth / 100
        errors[placement.FRAGMENTATION] = [
            error(predicted(p).device, p["measured_device_gb"]) for p in points
        ]
    # The share with the best worst case; the goal is within 5 % above and 2 % below.
    share = min(errors, key=lambda x: max(max(e / 5, -e / 2) for e in errors[x]))
    print(f"WORKSPACES = {workspaces / GB:.3f}e9")
    print(f"FRAGMENTATION = {share:.2f}  (the card's errors in per cent: {errors[share]})")
    print(f"CONTEXT = {placement.CONTEXT / GB:.3f}e9")
    print(f"OFFLOADING_CONTEXT = {placement.OFFLOADING_CONTEXT / GB:.3f}e9")
    print(f"{len(points)} points")


def report() -> None:
    """Fill in the predictions, print the table and the errors on the held-out points."""
    results = load()
    lines = [
        "| shape | method | r | tokens | ckpt | offload | dropout | optimizer "
        "| predicted | measured | error | card predicted | card measured | error |",
        "|---|---|--:|--:|---|---|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    errors = []
    for point in results["points"]:
        found = predicted(point)
        point["predicted_gb"] = round(found.peak / GB, 4)
        point["predicted_device_gb"] = round(found.device / GB, 4)
        point["error_percent"] = error(found.peak, point["measured_gb"])
        point["device_error_percent"] = error(found.device, point["measured_device_gb"])
        if point["held_out"]:
            errors += [point["error_percent"], point["device_error_percent"]]
        lines.append(
            f"| {point['shape']} | {point['method']} | {point['rank']} "
            f"| {point['tokens_per_step']} | {'yes' if point['checkpointing'] else 'no'} "
            f"| {'yes' if point['fast']['offload'] else 'no'} | {point['dropout']:g} "
            f"| {point['optimizer']} | {point['predicted_gb']:.2f} | {point['measured_gb']:.2f} "
            f"| {point['error_percent']:+.1f} % | {point['predicted_device_gb']:.2f} "
            f"| {point['measured_device_gb']:.2f} | {point['device_error_percent']:+.1f} %"
            f"{'' if point['held_out'] else ' (fit)'} |"
        )
    save(results)
    print("\n".join(lines))
    if errors:
        print(f"held out: {len(errors) // 2} points, {min(errors):+.1f} to {max(errors):+.1f} %")


def error(found: float, measured_gb: float) -> float:
    """Error of a prediction in bytes, in percent of the measurement; positive if too high."""
    return round(100 * (found / GB / measured_gb - 1), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--only", choices=("fit", "held-out", "all"), default="all")
    measuring.add_argument("--shapes", nargs="*", default=[], choices=sorted(SHAPES))
    commands.add_parser("fit")
    commands.add_parser("report")
    options = parser.parse_args()
    if options.command == "measure":
        measure(options.only, options.shapes)
    else:
        {"fit": fit, "report": report}[options.command]()


if __name__ == "__main__":
    main()
