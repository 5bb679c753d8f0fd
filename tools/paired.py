"""Row-by-row comparison of two runs that scored the same rows.

Each run keeps its scores in metrics/rows.csv (stages/evaluating/row_scores.py). Rows vary much more
than two models on one row, so paired differences are more sensitive than two intervals.
"""

import csv
import functools
import io
import math
import re
from typing import NamedTuple

from stages.evaluating.bootstrap import p_value
from stages.shared.process import StageError
from stages.shared.screen import on_screen
from stages.shared.sets import stem_of
from tools.revision import Revision

ROWS = "metrics/rows.csv"
EVAL, ANSWERS = "metrics/eval.json", "metrics/answers.json"
# Prefixes of the metrics of a set.
PREFIX = re.compile(r"((retention|group|source_\d+)_)?")
BY_NLL = ("perplexity", "bits_per_byte")
Scores = dict[tuple[str, str], dict[str, float]]


class Paired(NamedTuple):
    """The mean of now - before over `rows` common rows, and its p-value."""

    change: float
    p: float
    rows: int

    def __str__(self) -> str:
        p = "p < 0.01" if self.p < 0.01 else f"p = {self.p:.2g}"
        return f"{p}, {self.rows} rows"


def read_rows(revision: Revision) -> Scores:
    """(set, row) -> column -> number; empty if there is no such file.

    Raises StageError naming the first malformed line.
    """
    where = revision.where(ROWS)
    try:
        text = (revision.bytes(ROWS) or b"").decode()
        lines = csv.DictReader(io.StringIO(text), strict=True)
        found: Scores = {}
        for line in lines:
            key = (line.pop("set"), line.pop("row"))
            found[key] = {name: _number(value) for name, value in line.items() if value}
    except UnicodeDecodeError:
        raise StageError(f"{where}: not UTF-8 text; run evaluate again") from None
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        reason = on_screen(error, 60)
        raise StageError(
            f"{where}:{lines.line_num}: malformed row ({reason}); run evaluate again"
        ) from None
    return found


def _number(value: str) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(f"{value} is not finite")
    return number


class Pairs:
    """The common rows of `before` and `now`."""

    def __init__(self, before: Revision, now: Revision):
        self.before, self.now = read_rows(before), read_rows(now)

    @functools.cache  # noqa: B019 (two of them in a process, which then ends)
    def of(self, path: str, key: str) -> Paired | None:
        """The comparison of a metric; None unless it is a mean over common rows."""
        prefix = PREFIX.match(key)[0]  # type: ignore[index]  # It matches nothing too.
        who, _, name = key.removeprefix(prefix).partition("_")
        if path == EVAL and who in ("base", "tuned") and name in BY_NLL:
            plus, minus = f"{who}_nll", None
        elif path == EVAL and key == "retention_perplexity_change_percent":
            plus, minus = "tuned_nll", "base_nll"
        elif path == ANSWERS and who in ("base", "tuned"):
            plus, minus = f"{who}_{name}", None
        else:
            return None
        differences = []
        for row, new in self.now.items():
            old = self.before.get(row, {})
            if row[0] == stem_of(prefix) and old.get("tokens") == new.get("tokens"):
                earlier, after = (_value(side, plus, minus) for side in (old, new))
                if earlier is not None and after is not None:
                    differences.append(after - earlier)
        if not differences:
            return None
        mean = math.fsum(differences) / len(differences)
        return Paired(mean, p_value(differences), len(differences))


def _value(scores: dict[str, float], plus: str, minus: str | None) -> float | None:
    """One column, or the difference of two; None if the row has no such score."""
    if plus not in scores or (minus and minus not in scores):
        return None
    return scores[plus] - (scores[minus] if minus else 0.0)
