"""trl's trainer with the loss, the order of rows and the sums of several ranks of this pipeline."""

from collections import deque
from typing import Any

import torch
import trl.trainer.utils
from datasets import Dataset
from peft import PeftModel
from transformers.trainer_callback import PrinterCallback
from trl import SFTTrainer

from stages.shared.fast_path import FastPath
from stages.shared.ranks import ALONE, World
from stages.shared.rows import IGNORED, token_counts
from stages.shared.scoring import Scores, score
from stages.shared.streaming import Streamer
from stages.training import attention
from stages.training.dealing import Dealt, GroupedByLength, no_rows

# trl's output head skips positions that are not learned only if this says that Triton is available;
# scoring all took half of a step on a CPU. (trl's kernels ask another function.)
trl.trainer.utils._use_triton = lambda device: True
# Must come before a model that uses it is loaded.
attention.register()


class Trainer(SFTTrainer):
    """trl's trainer without its per-step statistics, each of which waits for the GPU.

    `tokens` is the number of tokens trained on so far, without padding.
    """

    model: PeftModel
    train_dataset: Dataset
    tokens = 0
    # Whether trl's output head gives the model's own logits (stages/training/trial.py).
    fused_head = True
    # What the trial left of it (stages/training/building.py).
    fast_path: FastPath
    # What weights in 16 bit add to the base as loaded.
    dense_bytes = 0
    # Set if layers of the base model are streamed.
    streamer: Streamer | None = None

    def __init__(self, world: World = ALONE, **options):
        self.world = world
        super().__init__(**options)
        # compute_loss needs num_items_in_batch, even if the family's own loss does not.
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)
        # Batches are collated ahead of their step; their tokens are counted then, on the host.
        self.ahead: deque[int] = deque()
        collate = self.data_collator

        def counting(examples):
            self.ahead.append(sum(len(example["input_ids"]) for example in examples))
            return collate(examples or no_rows(self.train_dataset))

        self.data_collator = counting

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean NLL of the learned tokens of a whole step, through trl's fused output head."""
        self.tokens += self.ahead.popleft()
        # The tokens of all ranks, whose gradients DDP averages.
        tokens = num_items_in_batch / self.world.size
        if self.fused_head:
            output = model(**inputs, use_cache=False, fused_lm_head=True)
            return -output.log_probs.sum() / tokens
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        learned = labels != IGNORED
        logits, labels = logits[learned].float(), labels[learned]
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / tokens

    def score(self, rows: list[dict], tokens_per_batch: int) -> Scores:
        """Score `rows` with the adapter as it is; streamed weights pass once."""
        return score(self.model, rows, tokens_per_batch, self.world, self.streamer)

    def _get_train_sampler(self, train_dataset=None):
        """Pass the rows' lengths, which transformers would find by decoding every row."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        lengths = token_counts(rows.with_format("arrow")[:])
        return GroupedByLength(self.rows_per_step, lengths, self)

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step, of all ranks together."""
        args = self.args
        return args.train_batch_size * args.gradient_accumulation_steps * self.world.size

    def get_train_dataloader(self):
        """With several ranks, give each its share of the rows of every step."""
        loader = super().get_train_dataloader()
        if self.world.size > 1:
            shard: Any = loader.batch_sampler
            lengths = token_counts(self.train_dataset.with_format("arrow")[:])
            order = shard.batch_sampler.sampler
            shard.batch_sampler = Dealt(order, lengths, self)
            # Dealt yields only this rank's rows, so accelerate must not shard them again.
            shard.num_processes, shard.process_index = 1, 0
            shard.batch_size, shard.even_batches = None, False
        return loader

    def _prepare_for_training(self, *positional, **named):
        """Give DDP's wrapper the cached methods of `remember_parameters` too."""
        model, loader = super()._prepare_for_training(*positional, **named)
        if model is not self.model:
            model.parameters, model.zero_grad = self.model.parameters, self.model.zero_grad
        return model, loader

    def floating_point_ops(self, inputs) -> int:
        """Not estimated: the estimate walks through all modules at every step."""
        return 0
