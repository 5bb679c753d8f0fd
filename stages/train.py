"""Train a LoRA adapter on the frozen base (QLoRA, arXiv 2305.14314).

    python -m stages.train

Reads data/prepared and models/quantized, writes models/adapter (a standard PEFT adapter with its
tokenizer), metrics/train.json, metrics/train_cost.json and metrics/curve.csv. Requires
models/plan.ok. A killed run resumes from its last checkpoint.
"""

import gc
import os
import shutil
from pathlib import Path
from typing import Any

from stages.shared.libraries import load_libraries
from stages.shared.outputs import check_sums, read_json, whole_folder, write_json, write_metrics
from stages.shared.params import Params, load_params
from stages.shared.process import StageError, begin, code_files

if __name__ == "__main__":
    begin("train")
    load_libraries("bitsandbytes", "datasets", "peft", "trl.trainer.sft_trainer")

import torch
from datasets import Dataset, disable_caching
from transformers import AutoConfig, AutoTokenizer

from stages.shared.adapter_record import adapter_record
from stages.shared.device import memory_metrics, memory_of_ranks, pick_device
from stages.shared.embeddings import extend, set_vocabulary
from stages.shared.fast_path import choose_fast_path, step_tokens
from stages.shared.launch import devices, run_ranks, see_one
from stages.shared.named_base import named_base
from stages.shared.packed import parameters_of
from stages.shared.paths import ADAPTER, PREPARED, QUANTIZED
from stages.shared.provenance import device_name, provenance
from stages.shared.ranks import ALONE, World, host, lacks_gpu_memory, look, put
from stages.shared.rows import read_rows
from stages.shared.watching import SIGNALED
from stages.shared.workload import read_lengths
from stages.training.building import TrainingSet, as_installed, build_trainer
from stages.training.checkpoints import (
    Checkpoints,
    checkpoint_folder,
    fingerprint,
    same_checkpoint,
)
from stages.training.dealing import share, who_works, workers
from stages.training.faults import Faults
from stages.training.machines import assign, describe, how_many, wait_for
from stages.training.out_of_memory import no_memory_for_base, no_memory_for_step
from stages.training.paged import state_bytes
from stages.training.placing import OUT_OF_MEMORY, load_placed, place, tighter, try_tighter
from stages.training.probe import Probe, needs_probe
from stages.training.progress import Progress, mean_loss, write_curve
from stages.training.settings import optimizer_steps
from stages.training.tracking import check_installed, trackers
from stages.training.trainer import Trainer
from stages.training.validation import Validation
from stages.training.worker import work


def train(whole: Params, device: torch.device, folder: Path, world: World = ALONE) -> dict:
    """Train, resuming from the newest checkpoint in `folder` if there is one; returns `outcome`.

    `whole` describes a whole step, of which each rank of `world` has a share.
    """
    disable_caching()
    params = whole.model_copy(update={"train": share(whole.train, world.size)})
    named = Dataset.from_file(str(PREPARED / "train.arrow"))
    rows = read_lengths(PREPARED)
    data = TrainingSet(
        rows=named.select_columns(["input_ids", "labels"]),
        tokenizer=AutoTokenizer.from_pretrained(PREPARED / "tokenizer"),
        max_length=rows.max_length,
        trained=rows.trained,
    )
    config = AutoConfig.from_pretrained(QUANTIZED)
    set_vocabulary(config, rows.vocabulary)
    largest = step_tokens(params.train, rows.tokens, data.max_length)
    fast = as_installed(choose_fast_path(params, config, device.type == "cuda"), config)
    placed = place(params, config, rows, device, world, tighter())
    try:
        model, streamer = load_placed(QUANTIZED, device, fast.attention, placed, world)
        extend(model, rows.vocabulary, rows.added)
    except torch.cuda.OutOfMemoryError:
        raise no_memory_for_base(placed.prediction) from None
    base_bytes, trainer = torch.cuda.memory_allocated(), None
    try:
        trainer = build_trainer(
            model, data, params, fast, placed.placement, folder, world, streamer
        )
        validation = Validation(trainer, validation_rows(), params.train, largest)
        progress = Progress(trainer, read_rows(PREPARED / "eval.arrow"), largest, validation)
        watchers = [progress, Faults(named, world)]
        # DDP rebuilds its buckets after the first backward pass, which changes the order of its
        # sums: a resumed run would differ from an undisturbed one.
        if world.size > 1 or (device.type == "cuda" and needs_probe(trainer.train_dataset)):
            # Inside the time that progress measures, and before faults records batches.
            watchers.insert(1, Probe(trainer))
        where = f"{device_name(device)}; {trainer.fast_path}"
        announce(whole, len(named), sum(rows.tokens), trainer, where)
        shown = trackers(whole.tracking.report_to, folder, world)
        fit(trainer, shown, validation, watchers, folder)
    except RuntimeError as error:
        if not lacks_gpu_memory(error):
            raise
        if world.store:
            # The stage tries again, once all ranks have ended.
            put(world.store, OUT_OF_MEMORY, True)
        elif placed.budget:
            try_tighter()
        raise no_memory_for_step(trainer, base_bytes, whole, placed.prediction) from None
    return outcome(
        trainer, validation, progress, placed.metrics(trainer.fast_path.fused_lora), folder
    )


def validation_rows() -> list[dict]:
    file = PREPARED / "validation.arrow"
    return read_rows(file) if file.exists() else []


def announce(params: Params, rows: int, tokens: int, trainer: Trainer, where: str) -> None:
    """Print the key numbers of the run."""
    trainable, total = parameters_of(trainer.model)
    batch = params.train.batch_size * params.train.gradient_accumulation
    steps = optimizer_steps(len(trainer.train_dataset), params.train)
    lora, root = params.lora, params.lora.scaling == "rslora"
    scale = "alpha/sqrt(r)" if root else "alpha/r"
    print(
        f"train: {rows} rows, {tokens} tokens, {steps} steps of {batch}; {trainable} of {total} "
        f"parameters trained ({100 * trainable / total:.2f} %), "
        f"{scale} = {lora.alpha / lora.r ** (0.5 if root else 1):g}; {where}",
        flush=True,
    )


def fit(
    trainer: Trainer, shown: list, validation: Validation, watchers: list, folder: Path
) -> None:
    """Train to the end with `watchers` (callbacks); a signal ends it with StageError.

    shown  trackers, which come first: some install signal handlers, which checkpoints then wrap
    """
    world = trainer.world
    checkpoints = Checkpoints(folder, world)
    for callback in (*shown, validation, checkpoints, *watchers):
        trainer.add_callback(callback)
    trainable = trainer.model.get_nb_trainable_parameters()[0]
    checkpoints.check_space(trainable, best=validation.keep == "best")
    resumed = same_checkpoint(folder, world)
    # Keep the garbage collector from rescanning library and dataset objects.
    gc.freeze()
    trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    checkpoints.raise_if_stopped()


def outcome(
    trainer: Trainer, validation: Validation, progress: Progress, placement: dict, folder: Path
) -> dict[str, Any]:
    """The metrics and the curve of a whole run with `placement`; saves the adapter in `folder`."""
    world = trainer.world
    adapter = folder / "adapter"
    check_alike(trainer)
    if world.first:
        validation.put_back()
        shutil.rmtree(adapter, ignore_errors=True)
        write_adapter(trainer, adapter)
    trainable, total = parameters_of(trainer.model)
    history = trainer.state.log_history
    metrics = {
        "train_loss": mean_loss(history),
        "steps": trainer.state.global_step,
        "tokens": progress.tokens,
        "trainable_params": trainable,
        "trainable_percent": 100 * trainable / total,
        **validation.metrics(history),
    }
    cost = {
        **provenance(trainer.model.device),
        "ranks": world.size,
        "fast_path": str(trainer.fast_path),
        **progress.cost(),
        **memory_of_ranks(world.gather(memory_metrics(state_bytes(trainer.optimizer)[1]))),
        **placement,
    }
    return {"metrics": metrics, "cost": cost, "history": history}


def check_alike(trainer: Trainer) -> None:
    """Raise StageError unless the ranks' adapters are bit-identical."""
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    sums = trainer.world.gather([float(p.detach().double().sum()) for p in trained])
    if any(other != sums[0] for other in sums):
        raise StageError("the ranks' adapters differ; check the GPUs, then run it again")


def write_outputs(made: dict[str, Any], folder: Path) -> None:
    """Write the result of `outcome` and the adapter in `folder`."""
    with whole_folder(ADAPTER) as out:
        shutil.copytree(folder / "adapter", out, dirs_exist_ok=True)
    write_metrics(Path("metrics/train.json"), made["metrics"])
    # Tells export whether these figures belong to the merged adapter.
    write_metrics(Path("metrics/train_cost.json"), adapter_record(ADAPTER) | made["cost"])
    write_curve(Path("metrics/curve.csv"), made["history"], made["metrics"].get("kept_step"))
    loss, seconds = made["metrics"]["train_loss"], made["cost"]["train_seconds"]
    print(f"train: loss {loss:.4f}, {seconds:.0f} s")


def write_adapter(trainer: Trainer, out: Path) -> None:
    """Save the adapter, float32, with reproducible bytes."""
    trainer.model.save_pretrained(str(out), save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)
    source = read_json(QUANTIZED / "source.json")
    config = read_json(out / "adapter_config.json")
    # PEFT writes sets in hash order, and the path of the base.
    for key in ("target_modules", "exclude_modules"):
        if config[key]:
            config[key] = sorted(config[key])
    write_json(out / "adapter_config.json", config | named_base(source), sort_keys=True)
    shutil.copytree(PREPARED / "tokenizer", out, dirs_exist_ok=True)


def train_on(devices: list[str], params: Params, folder: Path) -> dict[str, Any]:
    """Train in this process on one device, or in one rank on each of the devices that a step's
    rows can be divided among.

    Includes devices of other machines, if MACHINES or a scheduler names some.
    """
    machines = how_many()
    store, joined = wait_for(machines, describe(params)) if machines > 1 else (None, {})
    available = len(devices) + sum(joined.values())
    if available > 1:
        kind = "GPUs" if devices[0] else "ranks"
        print(f"train: {who_works(params.train, available, kind)}", flush=True)
    size = workers(params.train, available)
    own = devices[:size]
    others = assign(store, joined, len(own), size, folder.name)
    if size == 1:
        # The others have been told that they are not needed: started again by try_tighter, the
        # stage must not wait for them.
        os.environ["MACHINES"] = "1"
        see_one(devices[0])
        return train(params, pick_device(), folder)
    store = store or host()
    put(store, "task", {"key": folder.name})
    try:
        return run_ranks("train", work, own, store, size=size, others=others, stoppable=True)
    except StageError:
        out = look(store, OUT_OF_MEMORY) and not look(store, SIGNALED)
        if own[0] and machines == 1 and out:
            try_tighter()
        raise


def main() -> None:
    params = load_params()
    check_installed(params.tracking.report_to)
    check_sums(QUANTIZED, "quantize")
    check_sums(PREPARED, "prepare")
    found = devices()
    key = fingerprint(
        params.model_dump(include={"seed", "lora", "train"}),
        [PREPARED, QUANTIZED],
        code_files("train"),
        "cuda" if found[0] else "cpu",
    )
    with checkpoint_folder(key) as folder:
        write_outputs(train_on(found, params, folder), folder)


if __name__ == "__main__":
    main()
