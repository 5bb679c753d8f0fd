"""Print, as Markdown, what changed against another revision: metrics, quality first, and params.

    python -m tools.compare --base main

Compares the workspace with the base. Each change is marked better, worse or within noise; the
noise is what `python -m tools.noise` measured, and is spoken of only where it was measured: with
the base's model, data and parameters. Exit status 2 when the base is not known.
"""

import argparse
import math
from typing import Any

from stages.reporting.page import Mono, Paragraph, Section, Table, to_markdown
from stages.shared.process import StageError
from tools.gate import EVAL, is_number, unequal_sets
from tools.noise import COST, DATA, NOISE, RESULT, SUMMARY, Conditions, conditions
from tools.revision import Revision
from tools.screen import fail

# Quality first; what a run cost and was made with last.
VERIFY, TRAIN = "metrics/verify.json", "metrics/train.json"
FIRST = (EVAL, VERIFY, TRAIN)
LAST = "_cost.json"
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
# What metrics/data.json says of the rows that were trained on.
TRAIN_KEYS = ("train_", "length_")
HIGHER_IS_BETTER = ("tokens_per_second", "token_agreement")
# A parameter that train reads from plan's metrics: it stands among the parameters.
REPEATED = "vram_limit_gb"


def verdict(key: str, before: Any, now: Any, noise: float | None) -> str:
    """better, worse, within noise, or changed. `noise`: percent, between two runs by luck."""
    if not is_number(before) or not is_number(now) or math.isnan(before):
        return "changed"
    if noise is not None and abs(now - before) <= noise / 100 * abs(before):
        return "within noise"
    if key.endswith(NEARER_ZERO_IS_BETTER):
        return "better" if abs(now) < abs(before) else "worse"
    if key.endswith(LOWER_IS_BETTER):
        return "better" if now < before else "worse"
    if key.endswith(HIGHER_IS_BETTER):
        return "better" if now > before else "worse"
    return "changed"


def shown(value: Any) -> str:
    """A value of a table: a number, or text as such."""
    if value is None:
        return "missing"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value) if is_number(value) else Mono(cut(str(value), 200))


def cut(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def change(key: str, before: Any, now: Any) -> str:
    if not is_number(before) or not is_number(now) or not before:
        return ""
    if key.endswith("_percent"):
        return f"{now - before:+.3g} points"
    percent = 100 * (now - before) / abs(before)
    if not math.isfinite(percent):
        return ""
    return f"{percent:+.2f} %" if abs(percent) < 1000 else f"x {now / before:,.0f}"


def incomparable(before: dict[str, dict], now: dict[str, dict]) -> set[str]:
    """Metrics files whose numbers come of other data, which nothing makes better or worse."""
    old, new = before.get(DATA, {}), now.get(DATA, {})
    other_rows = [
        key for key in old if key.startswith(TRAIN_KEYS) and key in new and new[key] != old[key]
    ]
    if unequal_sets(before.get(EVAL, {}), now.get(EVAL, {})):
        # verify scores the merged model on the evaluation set too.
        return {EVAL, VERIFY, TRAIN}
    return {TRAIN} if other_rows else set()


def metric_rows(before: dict, now: dict, noise: dict[str, dict[str, float]]) -> list[list[str]]:
    """One row for each changed metric. `before` and `now` map a metrics file to its values."""
    other_data = incomparable(before, now)
    paths = dict.fromkeys([*FIRST, *before, *now])
    rows = []
    for path in sorted(paths, key=lambda path: path.endswith(LAST)):
        if path == SUMMARY:
            continue
        old, new = before.get(path, {}), now.get(path, {})
        for key in dict.fromkeys([*old, *new]):
            a, b = old.get(key), new.get(key)
            if a == b or key == REPEATED or key.endswith(("_low", "_high")):
                continue
            mark = verdict(key, a, b, noise.get(path, {}).get(key))
            if path in other_data:
                mark = "not comparable"
            name = Mono(f"{path.removeprefix('metrics/').removesuffix('.json')}: {key}")
            rows.append([name, shown(a), shown(b), change(key, a, b), mark])
    return rows


def param_rows(before: dict, now: dict) -> list[list[str]]:
    """One row for each changed parameter, by its dotted name."""
    return [
        [Mono(key), *(_param(side, key) for side in (before, now))]
        for key in dict.fromkeys([*before, *now])
        if key not in before or key not in now or before[key] != now[key]
    ]


def _param(values: dict, key: str) -> str:
    if key not in values:
        return "(none)"
    value = str(values[key])
    return value if is_number(values[key]) else Mono(cut(value, 200))


def unlike(measured: Conditions, here: Conditions, kept: tuple[str, ...] = ()) -> list[str]:
    """Names of what is not as it was `measured`; of the parameters all, or those of `kept` alone.

    What metrics say of the data may have grown since.
    """
    old, new = measured.params, here.params
    keys = [key for key in dict.fromkeys([*old, *new]) if key.startswith(kept or "")]
    found = [key for key in keys if key not in old or key not in new or old[key] != new[key]]
    return found + [key for key, value in measured.data.items() if here.data.get(key) != value]


def known_noise(base: Revision, now: Revision) -> tuple[dict[str, dict[str, float]], str]:
    """Metrics file -> key -> noise in percent, as far as it holds here; what it was measured on.

    It says how far two runs with the base's parameters lie apart. What was changed since is under
    test, unless it is the model or the data.
    """
    noise = now.json(str(RESULT), NOISE)
    if noise is None:
        return {}, "The noise is not measured yet: python -m tools.noise"
    if noise.measured_on is None:
        return {}, f"{RESULT} does not say what it was measured on: python -m tools.noise"
    params, commit = noise.measured_on.params, noise.commit[:10]
    model, data = (
        f"{params.get(f'{section}.id')} {params.get(f'{section}.revision') or ''}".strip()
        for section in ("model", "dataset")
    )
    if other := unlike(noise.measured_on, conditions(base)):
        whose = base.name
    else:
        other = unlike(noise.measured_on, conditions(now), kept=("model.",))
        whose = now.name
    if other:
        more = f" and {len(other) - 4} more" if len(other) > 4 else ""
        return {}, (
            f"Nothing is said of noise: it was measured on {model} and {data} with the parameters "
            f"of {commit}, and {whose} has other values of {', '.join(map(cut, other[:4]))}{more}. "
            "Measure yours: python -m tools.noise"
        )
    spreads = {
        path: {key: spread.noise_percent for key, spread in keys.items()}
        for path, keys in noise.metrics.items()
    }
    said = (
        "Within noise: no further apart than 95 of 100 pairs of runs that differ by the seed "
        f"alone, measured on {model} and {data} with the parameters of {base.name}: "
        f"{len(noise.seeds)} seeds at {commit} on {noise.device}."
    )
    if {side.metrics.get(COST, {}).get("device") for side in (base, now)} != {noise.device}:
        spreads = {path: keys for path, keys in spreads.items() if not path.endswith(LAST)}
        said += " Nothing is said of costs: they are another device's."
    return spreads, said


def comparison(base: Revision, now: Revision) -> str:
    """The whole comparison as Markdown."""
    noise, measured = known_noise(base, now)
    before, after = base.metrics, now.metrics
    rows = metric_rows(before, after, noise)
    blocks: list[Table | Paragraph] = [Paragraph("No metric changed.")]
    if rows:
        blocks = [Table(["Metric", base.name, "now", "change", ""], rows), Paragraph(measured)]
    old, new = before.get(EVAL, {}), after.get(EVAL, {})
    if unequal := unequal_sets(old, new):
        sets = [[Mono(key), shown(old[key]), shown(new.get(key))] for key in unequal]
        blocks.insert(0, Table(["The evaluation sets differ", base.name, "now"], sets))
    params = param_rows(base.settings, now.settings)
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
    except StageError as error:
        fail("compare", error)


if __name__ == "__main__":
    main()
