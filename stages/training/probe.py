"""The largest step that training can meet, tried before the first one.

Out of memory then comes in the first seconds and not after an hour. What is trained is not changed
by it: gradients are cleared, random states put back, and the optimizer never steps. Where rows are
about as long as each other, as full packs are, the first steps are the trial.
"""

import statistics

import torch
from datasets import Dataset
from transformers import TrainerCallback

from stages.shared.model import reset_peaks
from stages.shared.rows import lengths, token_counts
from stages.training.trainer import Trainer

# Of each trained parameter: Adam's two moments, and the gradient of an earlier micro-step.
ADAM_BYTES, GRADIENT_BYTES = 8, 4
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
