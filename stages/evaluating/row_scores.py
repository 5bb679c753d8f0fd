"""metrics/rows.csv: the scores of each row, so that two runs can be compared row by row.

One line per row: its set and index, the number of scored tokens, the summed NLL in nats of base
and tuned model, and for answered rows each measure of both answers. It contains no data: in two
runs that scored the same set (metrics/eval.json has its hash), an index is the same row.
"""

import csv
import io
from collections.abc import Sequence

from stages.evaluating.answers import WHO, Answered
from stages.shared.scoring import Scores
from stages.shared.sets import stem_of


def rows_csv(scored: dict[str, dict[str, Scores]], found: Sequence[Answered]) -> str:
    """The whole file; `scored` maps a set's prefix to the scores of base and tuned."""
    measures = list(found[0].scores[WHO[0]]) if found else []
    columns = [f"{who}_{name}" for name in measures for who in WHO]
    answered = {(one.prefix, one.place): one.scores for one in found}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["set", "row", "tokens", "base_nll", "tuned_nll", *columns])
    for prefix, scores in scored.items():
        name = stem_of(prefix)
        for place, tokens in enumerate(scores["base"].tokens):
            nll = [_short(scores[who].nll[place]) for who in WHO]
            own = answered.get((prefix, place))
            values = [_short(own[who][m]) for m in measures for who in WHO] if own else []
            values += [""] * (len(columns) - len(values))
            writer.writerow([name, place, tokens, *nll, *values])
    return text.getvalue()


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
