"""Print, as Markdown, what changed against another revision: metrics, quality first, and params.

    python -m tools.compare --base main

Compares the workspace with the base. Each change is marked better, worse or within noise: by a
paired test over rows if both scored the same ones, else by the noise that `python -m tools.noise`
measured, provided that it was measured with the base's model, data and parameters.
Exit status 2 if the base is not known.
"""

import argparse
import math
from typing import Any

from stages.reporting.page import Mono, Paragraph, Section, Table, to_markdown
from stages.shared.process import StageError
from tools.gate import EVAL, is_number, unequal_sets
from tools.noise import COST, DATA, NOISE, RESULT, SUMMARY, Conditions, conditions
from tools.paired import ANSWERS, ROWS, Paired, Pairs
from tools.revision import HARNESS, Revision
from tools.screen import fail

# Quality first, costs and versions last.
VERIFY, TRAIN = "metrics/verify.json", "metrics/train.json"
FIRST = (ANSWERS, EVAL, HARNESS, VERIFY, TRAIN)
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
    "retention_perplexity_change_percent",
)
# Keys of metrics/data.json about the training rows.
TRAIN_KEYS = ("train_", "length_")
HIGHER_IS_BETTER = ("tokens_per_second", "token_agreement")
# A parameter that train reads from plan's metrics; it is listed with the parameters.
REPEATED = "vram_limit_gb"
# Not measures, in metrics/answers.json and metrics/harness.json.
NO_MEASURE = ("_answer_tokens", "_rows", "limit")
# Shown together with a value.
OF_A_VALUE = ("_low", "_high", "_p_value", "_stderr")
# A difference with at least this p counts as noise.
BY_CHANCE = 0.05
ROW_BY_ROW = Paragraph(
    f"p is from a paired bootstrap over the rows that both scored ({ROWS}): how likely such a "
    f"difference is by the choice of rows alone. From {BY_CHANCE} on it counts as within noise. It "
    "says nothing about the effect of another seed."
)


def verdict(
    key: str, before: Any, now: Any, noise: float | None, pair: Paired | None = None
) -> str:
    """better, worse, within noise, or changed. `noise`: between two runs by chance, in percent."""
    if not is_number(before) or not is_number(now) or math.isnan(before):
        return "changed"
    if noise is not None and abs(now - before) <= noise / 100 * abs(before):
        return "within noise"
    if pair:
        chance = pair.p >= BY_CHANCE
        return f"{'within noise' if chance else direction(key, before, now)}, {pair}"
    return direction(key, before, now)


def direction(key: str, before: float, now: float) -> str:
    if key.endswith(LOWER_IS_BETTER):
        return "better" if now < before else "worse"
    if key.endswith(NEARER_ZERO_IS_BETTER):
        return "better" if abs(now) < abs(before) else "worse"
    if key.endswith(HIGHER_IS_BETTER):
        return "better" if now > before else "worse"
    return "changed"


def shown(value: Any) -> str:
    """A value for a table: a number, or text unchanged."""
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
    """Metrics files whose data differ, so that better and worse have no meaning."""
    old, new = before.get(DATA, {}), now.get(DATA, {})
    other_rows = [
        key for key in old if key.startswith(TRAIN_KEYS) and key in new and new[key] != old[key]
    ]
    if unequal_sets(before.get(EVAL, {}), now.get(EVAL, {})):
        # verify also scores on the evaluation set.
        return {ANSWERS, EVAL, VERIFY, TRAIN}
    asked = [side.get(HARNESS, {}).get("limit") for side in (before, now)]
    found = {HARNESS} if asked[0] != asked[1] else set()
    return found | {TRAIN} if other_rows else found


def metric_rows(
    before: dict, now: dict, noise: dict[str, dict[str, float]], pairs: Pairs | None = None
) -> list[list[str]]:
    """One row per changed metric. `before` and `now`: metrics file -> its values."""
    other_data = incomparable(before, now)
    paths = dict.fromkeys([*FIRST, *before, *now])
    rows = []
    for path in sorted(paths, key=lambda path: path.endswith(LAST)):
        if path == SUMMARY:
            continue
        old, new = before.get(path, {}), now.get(path, {})
        for key in dict.fromkeys([*old, *new]):
            a, b = old.get(key), new.get(key)
            if a == b or key == REPEATED or key.endswith(OF_A_VALUE):
                continue
            pair = pairs.of(path, key) if pairs and path not in other_data else None
            mark = verdict(key, a, b, noise.get(path, {}).get(key), pair)
            if path in (ANSWERS, HARNESS):
                mark = of_answers(key, mark, old, new, pair)
            if path in other_data:
                mark = "not comparable"
            name = Mono(f"{path.removeprefix('metrics/').removesuffix('.json')}: {key}")
            rows.append([name, shown(a), shown(b), change(key, a, b), mark])
    return rows


def of_answers(key: str, mark: str, old: dict, new: dict, pair: Paired | None) -> str:
    """The verdict on a measure of answers, where higher is better; else `mark`."""
    counts = {name for name in [*old, *new] if name.endswith("answered_rows")}
    if pair is None and any(old.get(name) != new.get(name) for name in counts):
        return "changed" if key in counts else "not comparable"
    a, b = old.get(key), new.get(key)
    if key.endswith(NO_MEASURE) or not is_number(a) or not is_number(b):
        return mark
    return mark.replace("changed", "better" if b > a else "worse")


def param_rows(before: dict, now: dict) -> list[list[str]]:
    """One row per changed parameter, by dotted name."""
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
    """Names of conditions that differ from the `measured` ones; of parameters all, or only `kept`.

    Keys that metrics have gained since are ignored.
    """
    old, new = measured.params, here.params
    keys = [key for key in dict.fromkeys([*old, *new]) if key.startswith(kept or "")]
    found = [key for key in keys if key not in old or key not in new or old[key] != new[key]]
    return found + [key for key, value in measured.data.items() if here.data.get(key) != value]


def known_noise(base: Revision, now: Revision) -> tuple[dict[str, dict[str, float]], str]:
    """Metrics file -> key -> noise in percent, where applicable; and what it was measured on.

    Applies to runs with the base's parameters. Later changes of parameters are under test, but
    model and data must be the same.
    """
    noise = now.json(str(RESULT), NOISE)
    if noise is None:
        return {}, "The noise has not been measured yet: python -m tools.noise"
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
            f"The noise is unknown: it was measured on {model} and {data} with the parameters "
            f"of {commit}, but {whose} has other values of {', '.join(map(cut, other[:4]))}{more}. "
            "Measure yours: python -m tools.noise"
        )
    spreads = {
        path: {key: spread.noise_percent for key, spread in keys.items()}
        for path, keys in noise.metrics.items()
    }
    said = (
        "Within noise: the difference is no larger than in 95 of 100 pairs of runs that differ "
        f"only by the seed, measured on {model} and {data} with the parameters of {base.name}: "
        f"{len(noise.seeds)} seeds at {commit} on {noise.device}."
    )
    if {side.metrics.get(COST, {}).get("device") for side in (base, now)} != {noise.device}:
        spreads = {path: keys for path, keys in spreads.items() if not path.endswith(LAST)}
        said += " Costs are not judged, since that was another device."
    return spreads, said


def comparison(base: Revision, now: Revision) -> str:
    """The whole comparison as Markdown."""
    noise, measured = known_noise(base, now)
    before, after = base.metrics, now.metrics
    rows = metric_rows(before, after, noise, Pairs(base, now))
    blocks: list[Table | Paragraph] = [Paragraph("No metric changed.")]
    if rows:
        blocks = [Table(["Metric", base.name, "now", "change", ""], rows), Paragraph(measured)]
        if any(" rows" in row[-1] for row in rows):
            blocks.append(ROW_BY_ROW)
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
