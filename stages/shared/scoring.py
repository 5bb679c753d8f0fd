"""Exact perplexity: exp(sum of NLL / number of scored tokens), for any batch size and order.

The mean of batch means that trainers report depends on the batch size (transformers#39241).
Here every scored token's NLL is computed in float32 and summed per row in float64.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from stages.shared.by_layer import last_hidden_states
from stages.shared.fitting import LOGITS, TOKENS_PER_BATCH
from stages.shared.ranks import ALONE, World
from stages.shared.rows import IGNORED, length_batches
from stages.shared.streaming import Streamer


@dataclass(frozen=True)
class Scores:
    """Sums per row, in row order: NLL in nats (float64) and number of scored tokens."""

    nll: list[float]
    tokens: list[int]

    @property
    def perplexity(self) -> float:
        return perplexity(math.fsum(self.nll) / sum(self.tokens))


def perplexity(nll: float) -> float:
    """exp of a mean NLL in nats; NaN for NaN; bounded, so that a broken model does not overflow."""
    return math.exp(min(nll, 700))


def score(
    model,
    rows: list[dict],
    tokens_per_batch: int = TOKENS_PER_BATCH,
    world: World = ALONE,
    streamer: Streamer | None = None,
) -> Scores:
    """Score the labelled tokens of `rows` (see rows.py) under `model`, with or without adapter.

    The ranks of `world` share the batches; results are identical for any number of ranks.
    """
    nll, tokens = [0.0] * len(rows), [0] * len(rows)
    for index, targets, logits in scored_logits(model, rows, tokens_per_batch, world, streamer):
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none").double()
        for row, loss in zip(index.tolist(), losses.tolist(), strict=True):
            nll[row] += loss
            tokens[row] += 1
    # Each row is scored on one rank and 0 on the others.
    parts = world.gather((nll, tokens))
    return Scores(
        nll=[sum(of_row) for of_row in zip(*(part[0] for part in parts), strict=True)],
        tokens=[sum(of_row) for of_row in zip(*(part[1] for part in parts), strict=True)],
    )


@torch.no_grad()
def scored_logits(
    model,
    rows: list[dict],
    tokens_per_batch: int = TOKENS_PER_BATCH,
    world: World = ALONE,
    streamer: Streamer | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield (row index [n], target ids [n], logits [n, vocabulary] in float32) in chunks.

    Each scored token appears once, on one rank of `world`; batches have rows of similar length,
    padded on the right. The order depends only on the rows, so two models' chunks can be compared
    one by one. `streamer` is given if the weights of `model` are streamed.
    """
    causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    chunk = max(1, LOGITS // causal.get_output_embeddings().weight.shape[0])
    numbered = [row | {"index": i} for i, row in enumerate(rows)]
    was_training = model.training
    model.eval()
    batches = length_batches(numbered, tokens_per_batch)[world.rank :: world.size]
    inputs = [_padded(batch) | {"use_cache": False} for batch in batches]
    with _autocast(causal):
        states = last_hidden_states(causal, inputs, streamer)
        for batch, hidden in zip(batches, states, strict=True):
            labels = torch.full(hidden.shape[:2], IGNORED)
            for i, row in enumerate(batch):
                labels[i, : len(row["labels"])] = torch.tensor(row["labels"])
            # The model predicts the next token: position t is scored by the label at t + 1.
            where = (labels[:, 1:] != IGNORED).nonzero()
            targets = labels[:, 1:][where[:, 0], where[:, 1]].to(hidden.device)
            index = torch.tensor([row["index"] for row in batch])[where[:, 0]]
            hidden = hidden[where[:, 0], where[:, 1]]
            for start in range(0, len(targets), chunk):
                part = slice(start, start + chunk)
                yield index[part], targets[part], head(causal, hidden[part]).float()
    model.train(was_training)


def _padded(batch: list[dict]) -> dict[str, torch.Tensor]:
    """Token ids and mask [rows, width]; the first row is the longest."""
    ids, mask = torch.zeros(2, len(batch), len(batch[0]["input_ids"]), dtype=torch.long)
    for i, row in enumerate(batch):
        ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[i, : len(row["input_ids"])] = 1
    return {"input_ids": ids, "attention_mask": mask}


def batch_count(rows: list[dict]) -> int:
    """How many ranks can share the scoring of `rows`."""
    return len(length_batches(rows, TOKENS_PER_BATCH))


def head(causal: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [n, vocabulary] of hidden states [n, H], by the model's own forward.

    The backbone is replaced to return `hidden`, so that whatever a family does to its logits
    (scales, caps) is applied.
    """
    # Some families call the decoder within the backbone.
    backbones: list[Any] = [m for m in (causal.base_model, causal.get_decoder()) if m is not causal]
    before = [(module, vars(module).get("forward")) for module in dict.fromkeys(backbones)]
    for module, _ in before:
        module.forward = lambda *_, **__: _Given(last_hidden_state=hidden[None])
    try:
        # The token ids are ignored.
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        return causal(input_ids=ids, use_cache=False).logits[0]
    finally:
        for module, forward in before:
            if forward is None:
                del module.forward
            else:
                module.forward = forward


class _Given(BaseModelOutputWithPast):
    """A backbone's output with only the hidden states."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _autocast(causal: PreTrainedModel):
    # Training runs under bfloat16 autocast on a GPU; the adapter is stored in float32.
    dtype = causal.get_output_embeddings().weight.dtype
    if causal.device.type == "cuda" and dtype == torch.bfloat16:
        return torch.autocast("cuda", dtype)
    return nullcontext()
