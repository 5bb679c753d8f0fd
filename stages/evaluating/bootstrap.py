"""Bootstrap over rows (Efron 1979): how much a figure depends on which rows were sampled.

Deterministic. Uses only the standard library, since the gate runs without other packages.
"""

import math
import random
from collections.abc import Sequence

RESAMPLES = 2000


def interval(rows: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """95 % interval of sum(values) / sum(weights) over rows of (value, weight)."""
    draw = random.Random(0)
    found = []
    for _ in range(RESAMPLES):
        sample = draw.choices(rows, k=len(rows))
        found.append(math.fsum(v for v, _ in sample) / sum(w for _, w in sample))
    found.sort()
    return found[int(0.025 * RESAMPLES)], found[int(0.975 * RESAMPLES) - 1]


def p_value(differences: Sequence[float]) -> float:
    """Two-sided p of a paired bootstrap: how often a resample's sum has the opposite sign.

    `differences` has one number per row. With few rows a bootstrap is overconfident, so p is never
    below that of a sign test in which all differing rows agree.
    """
    unequal = sum(map(bool, differences))
    if not unequal:
        return 1.0
    draw = random.Random(0)
    sums = [math.fsum(draw.choices(differences, k=len(differences))) for _ in range(RESAMPLES)]
    opposite = min(sum(s <= 0 for s in sums), sum(s >= 0 for s in sums))
    return min(1.0, max(2 * (opposite + 1) / (RESAMPLES + 1), 2.0 ** (1 - unequal)))
