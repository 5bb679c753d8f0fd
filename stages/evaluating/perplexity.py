"""Flat metrics of a scored set: perplexity with its interval, bits per byte, tokens and hash."""

import math

from stages.evaluating.bootstrap import interval, p_value
from stages.shared.rows import set_sha256
from stages.shared.scoring import Scores, perplexity


def perplexity_interval(scores: Scores) -> tuple[float, float]:
    """95 % bootstrap interval of the perplexity over rows."""
    low, high = interval(list(zip(scores.nll, scores.tokens, strict=True)))
    return perplexity(low), perplexity(high)


def set_metrics(prefix: str, rows: list[dict], base: Scores, tuned: Scores) -> dict:
    """Flat metrics of one set. Bits per byte compare across tokenizers."""
    scored_bytes = sum(row["scored_bytes"] for row in rows)
    metrics: dict[str, float | str] = {}
    for name, scores in (("base", base), ("tuned", tuned)):
        low, high = perplexity_interval(scores)
        metrics[f"{prefix}{name}_perplexity"] = scores.perplexity
        metrics[f"{prefix}{name}_perplexity_low"] = low
        metrics[f"{prefix}{name}_perplexity_high"] = high
        bits = math.fsum(scores.nll) / math.log(2)
        metrics[f"{prefix}{name}_bits_per_byte"] = bits / scored_bytes
    differences = [after - before for before, after in zip(base.nll, tuned.nll, strict=True)]
    metrics[f"{prefix}perplexity_p_value"] = p_value(differences)
    metrics[f"{prefix}eval_tokens"] = sum(tuned.tokens)
    metrics[f"{prefix}eval_set_sha256"] = set_sha256(rows)
    return metrics
