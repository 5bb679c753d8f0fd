"""Compares the predictions of two models on the same rows, with one model in memory at a time.

The reference is scored first and its logits written to a file; other models are then scored in the
same order (`scored_logits`) and compared with the file.
"""

import math
from dataclasses import dataclass
from io import BufferedRandom

import torch
from peft import PeftModel

from stages.shared.ranks import ALONE, World
from stages.shared.scoring import perplexity, scored_logits
from stages.shared.streaming import Streamer

# Logits are stored in float32, since 16-bit rounding would exceed the divergence of a good merge
# (1e-7 to 1e-5). They take vocabulary x 4 bytes per token, so beyond this size KL is computed on
# every second, third, … row; perplexity and agreement always on all rows.
MAX_CACHE_BYTES = 1_000_000_000
# Tokens whose probabilities are in float64 at once.
KL_CHUNK = 64


@dataclass(frozen=True)
class Reference:
    """Scores of the reference model: mean of NLL in nats, and what comparisons need.

    `top` and `cache` are of the tokens that this rank scores.
    """

    nll: float
    tokens: int
    top: torch.Tensor  # most likely next token of every scored token, [tokens]
    every: int  # KL is over rows 0, every, 2 * every, …
    cache: BufferedRandom  # logits of the scored tokens of those rows, [n, vocabulary] float32
    world: World

    @property
    def perplexity(self) -> float:
        return perplexity(self.nll)


@dataclass(frozen=True)
class Agreement:
    """A model against the reference. KL(reference || model) in nats per token."""

    perplexity: float
    mean_kl: float
    max_kl: float
    kl_tokens: int
    token_agreement: float
    nonfinite: int


def reference(
    model: PeftModel,
    rows: list[dict],
    cache: BufferedRandom,
    world: World = ALONE,
    streamer: Streamer | None = None,
) -> Reference:
    """Score `model` and write its logits to `cache`, an empty binary file.

    The ranks of `world` share the batches; each has its own cache.
    """
    vocabulary = model.get_output_embeddings().weight.shape[0]
    tokens = sum(label >= 0 for row in rows for label in row["labels"][1:])
    every = max(1, math.ceil(tokens * vocabulary * 4 / MAX_CACHE_BYTES))
    losses, top = [], [torch.empty(0, dtype=torch.long)]
    for index, targets, logits in scored_logits(model, rows, world=world, streamer=streamer):
        losses.append(_nll(logits, targets))
        top.append(logits.argmax(-1).cpu())
        cache.write(logits[index % every == 0].cpu().numpy().data)
    nll = math.fsum(_all(world, losses)) / tokens
    return Reference(nll, tokens, torch.cat(top), every, cache, world)


def agreement(
    model, rows: list[dict], ref: Reference, streamer: Streamer | None = None
) -> Agreement:
    """Score `model` on the rows of `ref`."""
    losses, divergences, agreed, nonfinite, done = [], [], 0, 0, 0
    ref.cache.seek(0)
    for index, targets, logits in scored_logits(model, rows, world=ref.world, streamer=streamer):
        nonfinite += int((~logits.isfinite()).sum())
        losses.append(_nll(logits, targets))
        agreed += int((logits.argmax(-1).cpu() == ref.top[done : done + len(logits)]).sum())
        done += len(logits)
        for kept in logits[index % ref.every == 0].split(KL_CHUNK):
            cached = torch.empty_like(kept, device="cpu")
            ref.cache.readinto(cached.numpy().data)
            p = cached.to(kept.device, torch.float64).log_softmax(-1)
            kl = (p.exp() * (p - kept.double().log_softmax(-1))).sum(-1)
            divergences += kl.tolist()
    every = _all(ref.world, divergences)
    return Agreement(
        perplexity=perplexity(math.fsum(_all(ref.world, losses)) / ref.tokens),
        mean_kl=_sum(every) / len(every),
        # Python's max would lose a NaN.
        max_kl=float(torch.tensor(every, dtype=torch.float64).max()),
        kl_tokens=len(every),
        token_agreement=sum(ref.world.gather(agreed)) / ref.tokens,
        nonfinite=sum(ref.world.gather(nonfinite)),
    )


def _all(world: World, values: list[float]) -> list[float]:
    """The values of all ranks, in order."""
    return [value for of_rank in world.gather(values) for value in of_rank]


def _sum(values: list[float]) -> float:
    """The exact sum, whatever the order; unlike math.fsum, infinities are allowed."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):
        return math.nan


def _nll(logits: torch.Tensor, targets: torch.Tensor) -> float:
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return float(losses.sum(dtype=torch.float64))
