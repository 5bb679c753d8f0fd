"""Print, as Markdown, what changed against another revision: metrics, quality first, and params.

    python -m tools.compare --base main

Compares the workspace with the base. Each change is marked better, worse or within noise; the
noise is what `python -m tools.noise` measured. Exit status 2 when the base is not known.
"""

import argparse
import math
from typing import Any

from stages.reporting.page import Mono, Paragraph, Section, Table, to_markdown
from tools.gate import EVAL, is_number, metrics, unequal_sets
from tools.noise import RESULT as NOISE
from tools.noise import SUMMARY
from tools.revision import PARAMS, Revision, fail

# Quality first; what a run cost last.
VERIFY = "metrics/verify.json"
FIRST = (EVAL, VERIFY, "metrics/train.json")
LAST = ("metrics/train_cost.json", "metrics/eval_cost.json")
NEARER_ZERO_IS_BETTER = ("_change_percent", "_error_percent")
LOWER_IS_BETTER = (
    "perplexity",
    "bits_per_byte",
    "loss",
    "kl",
    "_gb",
    "_seconds",
    "nonfinite_values",
    "leaked_examples",
)
HIGHER_IS_BETTER = ("tokens_per_second", "token_agreement")


def verdict(key: str, before, now, noise: float | None) -> str:
    """better, worse, within noise, or changed. `noise`: relative, between two runs by luck."""
    if not is_number(before) or not is_number(now) or math.isnan(before):
        return "changed"
    if noise is not None and abs(now - before) <= noise * abs(before):
        return "within noise"
    if key.endswith(NEARER_ZERO_IS_BETTER):
        return "better" if abs(now) < abs(before) else "worse"
    if key.endswith(LOWER_IS_BETTER):
        return "better" if now < before else "worse"
    if key.endswith(HIGHER_IS_BETTER):
        return "better" if now > before else "worse"
    return "changed"


def shown(value) -> str:
    return (
        f"{value:.6g}" if isinstance(value, float) else "missing" if value is None else str(value)
    )


def change(key: str, before, now) -> str:
    if not is_number(before) or not is_number(now) or not before:
        return ""
    if key.endswith("_percent"):
        return f"{now - before:+.3g} points"
    percent = 100 * (now - before) / abs(before)
    if not math.isfinite(percent):
        return ""
    return f"{percent:+.2f} %" if abs(percent) < 1000 else f"x {now / before:,.0f}"


def metric_rows(before: dict, now: dict, noise: dict) -> list[list[str]]:
    """One row for each changed metric. All three map a metrics file to its values."""
    unequal = unequal_sets(before.get(EVAL, {}), now.get(EVAL, {}))
    ends = (*FIRST, *LAST, SUMMARY)
    between = [path for path in dict.fromkeys([*before, *now]) if path not in ends]
    rows = []
    for path in (*FIRST, *between, *LAST):
        old, new = before.get(path, {}), now.get(path, {})
        for key in dict.fromkeys([*old, *new]):
            a, b = old.get(key), new.get(key)
            if a == b or key.endswith(("_low", "_high")):
                continue
            spread = noise.get(path, {}).get(key, {}).get("noise_percent")
            mark = verdict(key, a, b, None if spread is None else spread / 100)
            # verify scores the merged model on the evaluation set too.
            if path in (EVAL, VERIFY) and unequal:
                mark = "not comparable"
            name = Mono(f"{path.removeprefix('metrics/').removesuffix('.json')}: {key}")
            rows.append([name, shown(a), shown(b), change(key, a, b), mark])
    return rows


def param_rows(before: dict, now: dict) -> list[list[str]]:
    """One row for each changed parameter, by its dotted name."""
    old, new = flat(before), flat(now)
    keys = dict.fromkeys([*old, *new])
    absent = "(none)"
    return [
        [Mono(key), str(old.get(key, absent)), str(new.get(key, absent))]
        for key in keys
        if old.get(key, absent) != new.get(key, absent)
    ]


def flat(values: dict, prefix: str = "") -> dict:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def comparison(base: Revision, now: Revision) -> str:
    """The whole comparison as Markdown."""
    noise = now.json(str(NOISE))
    before, after = metrics(base), metrics(now)
    rows = metric_rows(before, after, noise["metrics"] if noise else {})
    blocks: list[Table | Paragraph] = [Table(["Metric", base.name, "now", "change", ""], rows)]
    if not rows:
        blocks = [Paragraph("No metric changed.")]
    if unequal := unequal_sets(before.get(EVAL, {}), after.get(EVAL, {})):
        blocks.insert(0, Paragraph(f"The evaluation sets differ: {'; '.join(unequal)}."))
    if noise is None:
        blocks.append(Paragraph("The noise is not measured yet: python -m tools.noise"))
    params = param_rows(base.yaml(PARAMS), now.yaml(PARAMS))
    changed = Table(["Parameter", base.name, "now"], params)
    sections = [
        Section("Metrics", blocks),
        Section("Parameters", [changed if params else Paragraph("No parameter changed.")]),
    ]
    return to_markdown(f"Compared with {base.name}, {base.commit[:10]}", sections)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="main", help="revision to compare the workspace with")
    arguments = parser.parse_args()
    try:
        print(comparison(Revision(arguments.base), Revision(None)), end="")
    except (LookupError, ValueError) as error:
        fail("compare", str(error))


if __name__ == "__main__":
    main()
