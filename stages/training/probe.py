"""Tries the largest possible step before training.

Running out of memory then shows in the first seconds instead of after an hour. The result is not
affected: gradients are cleared, random states restored, and the optimizer does not step. If rows
have similar lengths, as full packs do, the first steps serve as the trial.
"""

import statistics

import torch
from datasets import Dataset
from transformers import TrainerCallback

from stages.shared.device import reset_peaks
from stages.shared.rows import lengths, token_counts
from stages.training.trainer import Trainer

# Of each trained parameter: Adam's two moments, and the gradient of an earlier micro-step.
ADAM_BYTES, GRADIENT_BYTES = 8, 4
# Ratio of mean to maximum length from which rows count as equally long.
ALIKE = 0.95


def needs_probe(rows: Dataset) -> bool:
    """Whether a step over `rows` (packs, if packed) can be much larger than the first ones.

    Judged by tokens; the number of learned tokens has little effect.
    """
    tokens = token_counts(rows.with_format("arrow")[:])
    return statistics.fmean(tokens) < ALIKE * max(tokens)


class Probe(TrainerCallback):
    """Computes loss and gradients of the longest rows together, then discards them.

    Meanwhile it holds as much memory as later steps need for accumulated gradients and for the
    optimizer's state, which the first step creates. Paged state is not the allocator's.
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
            taken += ADAM_BYTES
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
