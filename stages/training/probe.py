"""The largest step that training can meet, tried before the first one; running out, explained.

Out of memory then comes in the first seconds and not after an hour. What is trained is not changed
by it: gradients are cleared, random states put back, and the optimizer never steps. Where rows are
about as long as each other, as full packs are, the first steps are the trial.
"""

import statistics
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainerCallback

from stages.shared.device import GB, reset_peaks
from stages.shared.outputs import read_json
from stages.shared.params import Params
from stages.shared.process import StageError
from stages.shared.rows import lengths, token_counts
from stages.training.trainer import Trainer

PLAN = Path("metrics/plan.json")
# Of each trained parameter: Adam's two moments, and the gradient of an earlier micro-step.
MOMENT_BYTES, GRADIENT_BYTES = 8, 4
# Mean length over the longest, from which on rows count as equally long.
ALIKE = 0.95


def needs_probe(rows: Dataset) -> bool:
    """Whether a step over `rows` (packs, when packed) can be much larger than the first ones.

    By their tokens alone: how many of them are learned changes the output head's memory a little.
    """
    tokens = token_counts(rows.with_format("arrow")[:])
    return statistics.fmean(tokens) < ALIKE * max(tokens)


class Probe(TrainerCallback):
    """Computes the loss and gradients of the longest rows together, then forgets them.

    Beside them lies as much memory as later steps find taken: by gradients that add up and by the
    optimizer's state, which is made in the first step. A paged one's is not the allocator's.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer, device = self.trainer, self.trainer.model.device
        rows = trainer.train_dataset
        # The output head's memory grows with what is learned.
        sizes = list(zip(*lengths(rows.with_format("arrow")[:]), strict=True))
        longest = sorted(range(len(rows)), key=sizes.__getitem__, reverse=True)
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        taken = GRADIENT_BYTES * (args.gradient_accumulation_steps > 1)
        if state.global_step == 0 and not args.optim.startswith("paged"):
            taken += MOMENT_BYTES
        counted = trainer.tokens
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            later = torch.empty(taken * trained, dtype=torch.uint8, device=device)
            batch = trainer.data_collator(
                [rows[i] for i in longest[: args.per_device_train_batch_size]]
            )
            learned = int((batch["labels"] >= 0).sum())
            trainer.training_step(trainer.model_wrapped, batch, max(1, learned))
            del later
        trainer.model.zero_grad(set_to_none=True)
        trainer.tokens = counted
        if device.type == "cuda":
            torch.cuda.empty_cache()
        reset_peaks()


def out_of_memory(trainer: Trainer, base_bytes: int, params: Params) -> StageError:
    """What was allocated by which part when the GPU ran out, what plan had said, what to change.

    base_bytes  of the model as loaded
    """
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    adapter = sum(p.nbytes for p in trained)
    gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
    state = trainer.optimizer.state.values() if trainer.optimizer else ()
    tensors = [v for entry in state for v in entry.values() if isinstance(v, torch.Tensor)]
    paged = sum(v.nbytes for v in tensors if getattr(v, "is_paged", False))
    optimizer = sum(v.nbytes for v in tensors) - paged
    if (
        not tensors
        and needs_probe(trainer.train_dataset)
        and not params.train.optimizer.startswith("paged")
    ):
        # What the probe kept free for it.
        optimizer = MOMENT_BYTES * sum(p.numel() for p in trained)
    peak = torch.cuda.max_memory_allocated()
    rest = peak - base_bytes - adapter - gradients - optimizer
    parts = {
        "base model": base_bytes,
        "adapter": adapter,
        "gradients": gradients,
        "optimizer": optimizer,
        "paged optimizer, besides": paged,
        "activations and the rest": max(0, rest),
    }
    listed = ", ".join(f"{name} {size / GB:.2f}" for name, size in parts.items() if size)
    return StageError(
        f"out of GPU memory{of_the_card()} with {peak / GB:.2f} GB allocated ({listed}); "
        f"{predicted()}; {cheaper(params)}"
    )


def too_large() -> StageError:
    """The GPU ran out before there was anything to train: the base does not fit."""
    return StageError(
        f"out of GPU memory{of_the_card()} while the base model was loaded; {predicted()}; set "
        "quantize.type: nf4 or take a smaller base, or see with nvidia-smi who else uses the GPU"
    )


def of_the_card() -> str:
    if not torch.cuda.is_available():
        return ""
    free, total = torch.cuda.mem_get_info()
    others = total - free - torch.cuda.memory_reserved()
    return f" of {total / GB:.1f} GB, of which others and CUDA hold {others / GB:.1f},"


def predicted() -> str:
    """What plan said, if it ran: its figures are metrics and may be absent."""
    if not PLAN.exists():
        return "plan left no prediction"
    plan = read_json(PLAN)
    return (
        f"plan had predicted {plan['predicted_peak_vram_gb']:.2f} GB, and "
        f"{plan['predicted_device_gb']:.2f} GB for the card"
    )


def cheaper(params: Params) -> str:
    """The parameter to change first; plan finds the cheapest change that fits a card."""
    train, first = params.train, ""
    if train.batch_size > 1:
        first = f"lower train.batch_size (now {train.batch_size})"
        first += " and raise train.gradient_accumulation as much"
    elif not train.gradient_checkpointing:
        first = "set train.gradient_checkpointing: true"
    elif params.lora.dropout:
        first = "set lora.dropout: 0"
    elif not train.optimizer.startswith("paged"):
        first = "set train.optimizer: paged_adamw_8bit"
    else:
        first = "lower prepare.max_length or take a smaller base"
    return f"{first}, or set plan.vram_limit_gb to the card's size and let plan choose"
