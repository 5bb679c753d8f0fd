"""Bootstrap over rows (Efron 1979): how far a figure would move had other rows been drawn.

The same input gives the same result. Standard library alone: the gate runs where no more is.
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
    """Two-sided p of a paired bootstrap: how easily rows like these would sum to the other sign.

    `differences` holds one number a row. Of few rows a bootstrap is too sure, so p is never below
    that of a sign test in which every row that differs agrees.
    """
    unequal = sum(map(bool, differences))
    if not unequal:
        return 1.0
    draw = random.Random(0)
    sums = [math.fsum(draw.choices(differences, k=len(differences))) for _ in range(RESAMPLES)]
    opposite = min(sum(s <= 0 for s in sums), sum(s >= 0 for s in sums))
    return min(1.0, max(2 * (opposite + 1) / (RESAMPLES + 1), 2.0 ** (1 - unequal)))
