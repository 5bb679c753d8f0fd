"""Fit a LoRA adapter on the frozen base (QLoRA, arXiv 2305.14314).

    python -m stages.train

Reads data/prepared and models/quantized, writes models/adapter (a standard PEFT adapter with its
tokenizer), metrics/train.json, metrics/train_cost.json and metrics/curve.csv. models/plan.ok is
the permission to start. A killed run continues from its last checkpoint.
"""

import csv
import gc
import io
import math
import shutil
import time
from pathlib import Path

from stages.shared.libraries import load_libraries
from stages.shared.outputs import (
    check_space,
    check_sums,
    read_json,
    whole_folder,
    write_json,
    write_metrics,
    write_text,
)
from stages.shared.params import Params, load_params
from stages.shared.process import begin, code_files, sha256

if __name__ == "__main__":
    begin("train")
    load_libraries("bitsandbytes", "datasets", "peft", "trl.trainer.sft_trainer")

import torch
from datasets import Dataset, disable_caching
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, TrainerCallback

from stages.shared.model import (
    device_name,
    load_base,
    memory_metrics,
    pick_device,
    reset_peaks,
)
from stages.shared.rows import PREPARED, read_rows, token_counts
from stages.shared.scoring import TOKENS_PER_BATCH, score
from stages.training.checkpoints import (
    KEPT,
    Checkpoints,
    checkpoint_folder,
    fingerprint,
    newest_complete,
)
from stages.training.faults import Faults
from stages.training.probe import Probe, needs_probe, out_of_memory, too_large
from stages.training.trainer import (
    Trainer,
    build_trainer,
    choose_attention,
    choose_fast_path,
    optimizer_steps,
)

QUANTIZED = Path("models/quantized")
ADAPTER = Path("models/adapter")
# The held-out loss along the way: enough rows to see a trend, few enough to cost little.
CURVE_POINTS = 4
CURVE_ROWS = 32
CURVE_LINES = 200
WARM_STEPS = 3


class Progress(TrainerCallback):
    """One bar, the held-out loss along the way, and the clock.

    `seconds` is the wall time of training with its data loading and warm-up, without the scoring
    of held-out rows. It travels in the checkpoints: a resumed run reports its whole cost.

    step_tokens  of the largest step: scoring takes no more at once, so that the memory that was
                 predicted, and tried when training began, is enough for it
    """

    def __init__(self, trainer: Trainer, held_out: list[dict], step_tokens: int):
        self.trainer = trainer
        self.held_out = held_out[:CURVE_ROWS]
        self.tokens_per_batch = min(step_tokens, TOKENS_PER_BATCH)
        self.seconds = 0.0
        self.warm: tuple[float, float] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.seconds = max((entry.get("seconds", 0.0) for entry in state.log_history), default=0.0)
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="train", disable=None
        )
        # What loading a checkpoint takes is not of training.
        reset_peaks()
        self.mark = time.monotonic()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        every = max(1, state.max_steps // CURVE_POINTS)
        scoring = state.global_step % every == 0 or state.global_step == state.max_steps
        if model.device.type == "cuda" and (scoring or control.should_save):
            torch.cuda.synchronize()
        self.seconds += time.monotonic() - self.mark
        self.bar.update()
        if scoring:
            scores = score(model, self.held_out, self.tokens_per_batch)
            loss = math.fsum(scores.nll) / sum(scores.tokens)
            state.log_history.append({"step": state.global_step, "eval_loss": loss})
        if control.should_save:
            state.log_history.append({"step": state.global_step, "seconds": self.seconds})
        self.mark = time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            if state.global_step >= WARM_STEPS and self.warm is None:
                self.warm = (self.seconds, self.trainer.tokens)
            self.last = (self.seconds, self.trainer.tokens)
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def steady_tokens_per_second(self) -> float:
        """Rate after the first WARM_STEPS steps; of all steps when hardly any follow."""
        if self.warm is None or self.last[1] < 2 * self.warm[1]:
            return self.last[1] / self.last[0]
        return (self.last[1] - self.warm[1]) / (self.last[0] - self.warm[0])

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def write_adapter(trainer: Trainer, out: Path) -> None:
    """Save the adapter, float32, with bytes that depend on nothing but the run."""
    trainer.model.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)
    source = read_json(QUANTIZED / "source.json")
    config = read_json(out / "adapter_config.json")
    # PEFT writes a set in hash order, and the path that the base was loaded from.
    config["target_modules"] = sorted(config["target_modules"])
    config["base_model_name_or_path"] = source["id"] if source["source"] == "hub" else "models/base"
    config["revision"] = source["commit"]
    write_json(out / "adapter_config.json", config, sort_keys=True)
    shutil.copytree(PREPARED / "tokenizer", out, dirs_exist_ok=True)


def curve(history: list[dict]) -> str:
    """metrics/curve.csv: about CURVE_LINES lines, the loss as the mean since the line before."""
    columns = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm")
    steps: dict[int, dict] = {}
    for entry in history:
        known = {key: entry[key] for key in columns if key in entry}
        steps.setdefault(entry["step"], {}).update(known)
    every, losses = math.ceil(len(steps) / CURVE_LINES), []
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for step, line in sorted(steps.items()):
        losses.append(line["loss"])
        if step % every == 0 or step == max(steps) or "eval_loss" in line:
            line["loss"] = math.fsum(losses) / len(losses)
            losses.clear()
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()})
    return text.getvalue()


def mean_loss(history: list[dict]) -> float:
    """Mean over all steps. The trainer's own leaves out those before a resume."""
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return math.fsum(losses) / len(losses)


def paged_bytes(trainer: Trainer) -> int:
    """Bytes of optimizer state in managed memory (bitsandbytes' paged optimizers)."""
    return sum(
        value.numel() * value.element_size()
        for state in trainer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and getattr(value, "is_paged", False)
    )


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


def train(params: Params, device: torch.device, folder: Path) -> None:
    """Train, from the newest checkpoint in `folder` if there is one, and write the outputs."""
    disable_caching()
    max_length = read_json(PREPARED / "prepared.json")["max_length"]
    named = Dataset.from_file(str(PREPARED / "train.arrow"))
    rows = named.select_columns(["input_ids", "labels"])
    config = AutoConfig.from_pretrained(QUANTIZED)
    try:
        model = load_base(QUANTIZED, device, choose_attention(params.train, config, device))
    except torch.cuda.OutOfMemoryError:
        raise too_large() from None
    base_bytes = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    row_tokens = token_counts(named.data.table)
    width = max_length if params.train.batching == "packing" else max(row_tokens)
    step_tokens = params.train.batch_size * width
    fast = choose_fast_path(model, params.lora, params.train, step_tokens)
    tokenizer = AutoTokenizer.from_pretrained(PREPARED / "tokenizer")
    trainer = build_trainer(model, tokenizer, rows, params, max_length, folder, fast)
    checkpoints = Checkpoints(folder)
    progress = Progress(trainer, read_rows(PREPARED / "eval.arrow"), step_tokens)
    callbacks = [checkpoints, progress, Faults(named)]
    if device.type == "cuda" and needs_probe(trainer.train_dataset):
        # Within the time that progress counts, and before faults notes batches.
        callbacks.insert(2, Probe(trainer))
    for callback in callbacks:
        trainer.add_callback(callback)
    trainable, total = trainer.model.get_nb_trainable_parameters()
    tokens = sum(row_tokens)
    announce(params, len(rows), tokens, trainer, f"{device_name(device)}; {fast}")
    # Float32 values, with two moments each in a checkpoint.
    check_space(folder, trainable * (4 + 12 * (KEPT + 1)), "the adapter with its checkpoints")
    resumed = newest_complete(folder)
    if resumed:
        print(f"train: goes on from {resumed.name}", flush=True)
    # Or every collection looks through all that the libraries and the rows hold.
    gc.freeze()
    try:
        result = trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    except torch.cuda.OutOfMemoryError:
        raise out_of_memory(trainer, base_bytes, params) from None
    checkpoints.raise_if_stopped()
    with whole_folder(ADAPTER) as out:
        write_adapter(trainer, out)
    metrics = {
        "train_loss": mean_loss(trainer.state.log_history),
        "steps": result.global_step,
        "tokens": round(tokens * params.train.epochs),
        "trainable_params": trainable,
        "trainable_percent": 100 * trainable / total,
    }
    cost = {
        "device": device_name(device),
        # By it export knows whether these figures are those of the adapter that was merged.
        "adapter_sha256": sha256(ADAPTER / "adapter_model.safetensors"),
        "train_seconds": progress.seconds,
        "tokens_per_second": metrics["tokens"] / progress.seconds,
        "steady_tokens_per_second": progress.steady_tokens_per_second(),
    }
    write_metrics(Path("metrics/train.json"), metrics)
    write_metrics(Path("metrics/train_cost.json"), cost | memory_metrics(paged_bytes(trainer)))
    write_text(Path("metrics/curve.csv"), curve(trainer.state.log_history))
    print(f"train: loss {metrics['train_loss']:.4f}, {progress.seconds:.0f} s")


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


if __name__ == "__main__":
    main()
