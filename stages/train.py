"""Fit a LoRA adapter on the frozen base (QLoRA, arXiv 2305.14314).

    python -m stages.train

Reads data/prepared and models/quantized, writes models/adapter (a standard PEFT adapter with its
tokenizer), metrics/train.json, metrics/train_cost.json and metrics/curve.csv. models/plan.ok is
the permission to start. A killed run continues from its last checkpoint.
"""

import gc
import shutil
from pathlib import Path

from stages.shared.libraries import load_libraries
from stages.shared.outputs import check_sums, read_json, whole_folder, write_json, write_metrics
from stages.shared.params import Params, load_params
from stages.shared.process import begin, code_files, sha256

if __name__ == "__main__":
    begin("train")
    load_libraries("bitsandbytes", "datasets", "peft", "trl.trainer.sft_trainer")

import torch
from datasets import Dataset, disable_caching
from transformers import AutoConfig, AutoTokenizer

from stages.shared.device import memory_metrics, pick_device
from stages.shared.fast_path import choose_fast_path, step_tokens
from stages.shared.paths import ADAPTER, PREPARED, QUANTIZED
from stages.shared.provenance import device_name, provenance
from stages.shared.rows import read_rows
from stages.shared.workload import read_lengths
from stages.training.checkpoints import Checkpoints, checkpoint_folder, fingerprint, newest_complete
from stages.training.faults import Faults
from stages.training.out_of_memory import no_memory_for_base, no_memory_for_step
from stages.training.paged import state_bytes
from stages.training.placing import load_placed, place, tighter, try_tighter
from stages.training.probe import Probe, needs_probe
from stages.training.progress import Progress, mean_loss, write_curve
from stages.training.trainer import (
    Trainer,
    TrainingSet,
    as_installed,
    build_trainer,
    optimizer_steps,
)


def train(params: Params, device: torch.device, folder: Path) -> None:
    """Train, from the newest checkpoint in `folder` if there is one, and write the outputs."""
    disable_caching()
    named = Dataset.from_file(str(PREPARED / "train.arrow"))
    rows = read_lengths(PREPARED)
    data = TrainingSet(
        rows=named.select_columns(["input_ids", "labels"]),
        tokenizer=AutoTokenizer.from_pretrained(PREPARED / "tokenizer"),
        max_length=rows.max_length,
    )
    config = AutoConfig.from_pretrained(QUANTIZED)
    largest = step_tokens(params.train, rows.tokens, data.max_length)
    fast = as_installed(choose_fast_path(params, config, device.type == "cuda"))
    placed = place(params, config, rows, device, tighter())
    try:
        model, streamer = load_placed(QUANTIZED, device, fast.attention, placed.placement)
    except torch.cuda.OutOfMemoryError:
        raise no_memory_for_base(placed.prediction) from None
    base_bytes = torch.cuda.memory_allocated()
    trainer = build_trainer(model, data, params, fast, placed.placement, folder, streamer)
    progress = Progress(trainer, read_rows(PREPARED / "eval.arrow"), largest)
    watchers = [progress, Faults(named)]
    if device.type == "cuda" and needs_probe(trainer.train_dataset):
        # Within the time that progress counts, and before faults notes batches.
        watchers.insert(1, Probe(trainer))
    announce(params, len(named), sum(rows.tokens), trainer, f"{device_name(device)}; {fast}")
    try:
        fit(trainer, watchers, folder)
    except torch.cuda.OutOfMemoryError:
        try_tighter(placed)
        raise no_memory_for_step(trainer, base_bytes, params, placed.prediction) from None
    write_outputs(trainer, progress, placed.metrics())


def announce(params: Params, rows: int, tokens: int, trainer: Trainer, where: str) -> None:
    """Say in numbers what is about to happen."""
    trainable, total = trainer.model.get_nb_trainable_parameters()
    batch = params.train.batch_size * params.train.gradient_accumulation
    steps = optimizer_steps(len(trainer.train_dataset), params.train)
    print(
        f"train: {rows} rows, {tokens} tokens, {steps} steps of {batch}; {trainable} of {total} "
        f"parameters train ({100 * trainable / total:.2f} %), "
        f"alpha/r = {params.lora.alpha / params.lora.r:g}; {where}",
        flush=True,
    )


def fit(trainer: Trainer, watchers: list, folder: Path) -> None:
    """Train to the end under `watchers` (callbacks); a signal ends it with StageError."""
    checkpoints = Checkpoints(folder)
    for callback in (checkpoints, *watchers):
        trainer.add_callback(callback)
    checkpoints.check_space(trainer.model.get_nb_trainable_parameters()[0])
    resumed = newest_complete(folder)
    # Or every collection looks through all that the libraries and the rows hold.
    gc.freeze()
    trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    checkpoints.raise_if_stopped()


def write_outputs(trainer: Trainer, progress: Progress, placement: dict) -> None:
    """The adapter, the metrics and the curve of a whole run; `placement` says what lay where."""
    with whole_folder(ADAPTER) as out:
        write_adapter(trainer, out)
    trainable, total = trainer.model.get_nb_trainable_parameters()
    history = trainer.state.log_history
    metrics = {
        "train_loss": mean_loss(history),
        "steps": trainer.state.global_step,
        "tokens": trainer.tokens,
        "trainable_params": trainable,
        "trainable_percent": 100 * trainable / total,
    }
    cost = {
        **provenance(trainer.model.device),
        # By it export knows whether these figures are those of the adapter that was merged.
        "adapter_sha256": sha256(ADAPTER / "adapter_model.safetensors"),
        **progress.cost(),
        **memory_metrics(state_bytes(trainer.optimizer)[1]),
        **placement,
    }
    write_metrics(Path("metrics/train.json"), metrics)
    write_metrics(Path("metrics/train_cost.json"), cost)
    write_curve(Path("metrics/curve.csv"), history)
    print(f"train: loss {metrics['train_loss']:.4f}, {progress.seconds:.0f} s")


def write_adapter(trainer: Trainer, out: Path) -> None:
    """Save the adapter, float32, with bytes that depend on nothing but the run."""
    trainer.model.save_pretrained(str(out), save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)
    source = read_json(QUANTIZED / "source.json")
    config = read_json(out / "adapter_config.json")
    # PEFT writes a set in hash order, and the path that the base was loaded from.
    config["target_modules"] = sorted(config["target_modules"])
    config["base_model_name_or_path"] = source["id"] if source["source"] == "hub" else "models/base"
    config["revision"] = source["commit"]
    write_json(out / "adapter_config.json", config, sort_keys=True)
    shutil.copytree(PREPARED / "tokenizer", out, dirs_exist_ok=True)


def main() -> None:
    params = load_params()
    check_sums(QUANTIZED, "quantize")
    check_sums(PREPARED, "prepare")
    device = pick_device()
    key = fingerprint(
        params.model_dump(include={"seed", "lora", "train"}),
        [PREPARED, QUANTIZED],
        code_files("train"),
        device.type,
    )
    with checkpoint_folder(key) as folder:
        train(params, device, folder)


if __name__ == "__main__":
    main()
