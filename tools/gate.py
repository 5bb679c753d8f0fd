"""Fail if a commit loses quality compared with another one. For CI and for reviewers.

    python -m tools.gate --base origin/main

Judges what is committed at HEAD. Limits come from gate.yaml at the base, so that the change under
review cannot move them. Needs no GPU, no DVC remote and no run; hence it cannot tell whether
consistent metrics and dvc.lock come from a run at all, which `tools/check_repro.py` checks.
Exit status: 0 passed, 1 a limit was broken, 2 could not be judged.
"""

import argparse
import math
import sys
from typing import Annotated, Any, Literal, TypeGuard

from pydantic import Field, TypeAdapter

from stages.shared.params import value_at
from stages.shared.process import StageError
from stages.shared.screen import on_screen
from tools.paired import EVAL, Paired, Pairs
from tools.revision import DVC_LOCK, DVC_YAML, PARAMS, Revision, git
from tools.schemas import Run, Stage
from tools.screen import fail

GATE = "gate.yaml"
SET_KEYS = ("eval_tokens", "eval_set_sha256")
Rule = Literal[
    "may_rise_percent",
    "may_fall_percent",
    "no_rise_below_p",
    "no_fall_below_p",
    "at_most",
    "at_least",
]
# A limit that is not a number would never break, and neither would an empty one.
Rules = Annotated[dict[Rule, Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=1)]
LIMITS = TypeAdapter(dict[str, Annotated[dict[str, Rules], Field(min_length=1)]])
# 14 to 15.4 is 10 %, but slightly more in binary.
ROUNDING = 1e-9


def is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def broken_limits(
    limits: dict, base: dict[str, dict], head: dict[str, dict], pairs: Pairs | None = None
) -> list[str]:
    """One line for each limit that the metrics of `head` break, and by how much.

    `base` and `head`: metrics file -> its values. A limit on a change applies only if the base has
    the metric, a limit by p only if both scored the same rows.
    """
    found = []
    for path, keys in limits.items():
        for key, rules in keys.items():
            now, before = head.get(path, {}).get(key), base.get(path, {}).get(key)
            if now is None:
                found.append(f"{path}: {key} is missing")
            elif not is_number(now):
                found.append(f"{path}: {key} is not a number ({now!r})")
            elif math.isfinite(now):
                pair = pairs.of(path, key) if pairs else None
                found += [
                    f"{path}: {key} {line}"
                    for rule, value in rules.items()
                    if (line := broken(rule, value, before, now, pair))
                ]
    return found


def broken(
    rule: str, limit: float, before: Any, now: float, pair: Paired | None = None
) -> str | None:
    """What is wrong with `now` under one rule, or None. A value at the limit passes."""
    if rule == "at_most" and now > limit:
        return f"is {now:g}; at most {limit:g} is allowed"
    if rule == "at_least" and now < limit:
        return f"is {now:g}; at least {limit:g} is required"
    if not is_number(before) or not math.isfinite(before):
        return None
    row_by_row = f" ({pair}, paired)" if pair else ""
    if rule.endswith("_below_p"):
        rises = rule == "no_rise_below_p"
        if pair is None or pair.p >= limit or (pair.change > 0) != rises:
            return None
        verb = "rose" if rises else "fell"
        return f"{verb} from {before:g} to {now:g}{row_by_row}; p below {limit:g} is not allowed"
    if not rule.startswith("may_"):
        return None
    change = now - before if rule == "may_rise_percent" else before - now
    if change <= abs(before) * limit / 100 + abs(before) * ROUNDING:
        return None
    percent = f"{100 * change / abs(before):.2f} %" if before else f"{change:g} from 0"
    verb = "rose" if rule == "may_rise_percent" else "fell"
    return f"{verb} by {percent}, from {before:g} to {now:g}{row_by_row}; {limit:g} % is allowed"


def not_finite(head: dict[str, dict]) -> list[str]:
    return [
        f"{path}: {key} is {value}"
        for path, values in head.items()
        for key, value in values.items()
        if is_number(value) and not math.isfinite(value)
    ]


def unequal_sets(base: dict, head: dict) -> list[str]:
    """Keys of evaluation sets that differ between two eval.json, which prevents a comparison."""
    return [key for key in base if key.endswith(SET_KEYS) and head.get(key) != base[key]]


def redefined(stage: Stage, run: Run) -> list[str]:
    """Parts of a stage in dvc.yaml that differ from its last run as recorded in dvc.lock."""
    parts = {
        "command": (stage.cmd, run.cmd),
        "deps": (set(stage.paths("deps")), {dep.path for dep in run.deps}),
        "params": (set(stage.paths("params")), set(run.params.get(PARAMS, {}))),
        "outs": (set(stage.paths("outs", "metrics", "plots")), {out.path for out in run.outs}),
    }
    return [part for part, (now, then) in parts.items() if now != then]


def edited(path: str, base: Revision, head: Revision) -> bool:
    """Whether the committed file `path`, or one below the folder `path`, differs."""
    parent = f"{head.at(path)}/"
    files = {file for file in base.files | head.files if f"{file}/".startswith(parent)}
    return any(base.files.get(file) != head.files.get(file) for file in files)


def inconsistent(head: Revision, base: Revision) -> list[str]:
    """What is committed but differs from dvc.lock: metrics, code, parameters, or the chain.

    DVC records each file's MD5 after running a stage, so a hand-edited metrics file is found.
    """
    made = {out.path: out.md5 for run in head.lock.stages.values() for out in run.outs}
    found = []
    for path in head.pipeline.declared("metrics", "plots"):
        actual = head.md5(path)
        if actual != made.get(path):
            what = "missing" if actual is None else f"not what {DVC_LOCK} recorded"
            found.append(f"{path} is {what}")
    for name, stage in head.pipeline.stages.items():
        if name in head.lock.stages:
            run = head.lock.stages[name]
            other = [f"other {part} than {DVC_YAML} has" for part in redefined(stage, run)]
            other += [f"another {what}" for what in outdated(run, made, head, base)]
            found += [f"stage {name} ran with {what}" for what in other]
        else:
            found.append(f"stage {name} has never run: it is not in {DVC_LOCK}")
    return found


def outdated(run: Run, made: dict[str, str], head: Revision, base: Revision) -> list[str]:
    """Dependencies and parameters of `head` that differ from a stage's last run.

    `made`: output of any stage -> its MD5. A folder may contain files that Git ignores, so its
    hash cannot be computed from a commit; instead, if its committed files changed since `base`,
    its hash must have changed too.
    """
    before = {dep.path: dep.md5 for run in base.lock.stages.values() for dep in run.deps}
    found = []
    for dep in run.deps:
        expected = made.get(dep.path) or head.md5(dep.path)
        if expected is None:
            stale = before.get(dep.path) == dep.md5 and edited(dep.path, base, head)
        else:
            stale = expected != dep.md5
        if stale:
            found.append(dep.path)
    recorded = run.params.get(PARAMS, {})
    return found + [
        f"{key} in {PARAMS}"
        for key, value in recorded.items()
        if value_at(head.params, key) != value
    ]


def judge(base: Revision, head: Revision) -> tuple[int, list[str]]:
    """Exit status and the lines that explain it."""
    notices = []
    limits = base.yaml(GATE, LIMITS)
    if not limits:
        notices.append(f"notice: no {GATE} at {base.name}; the limits are HEAD's own")
        limits = head.yaml(GATE, LIMITS)
    if not limits:
        raise StageError(f"{GATE}: no limits, neither at {base.name} nor at HEAD; add some")
    before, now = base.metrics, head.metrics
    if EVAL not in before:
        notices.append(f"notice: {base.name} has no {EVAL} yet; there is nothing to compare with")
        if not now:
            return 0, [*notices, "gate: passed: neither revision has metrics"]
    if found := inconsistent(head, base):
        lines = [f"not consistent: {line}; run dvc repro and commit" for line in found]
        return 2, [*notices, *lines, f"gate: FAILED: {DVC_LOCK} records different results"]
    old, new = before.get(EVAL, {}), now.get(EVAL, {})
    if unequal := unequal_sets(old, new):
        lines = [f"{EVAL}: {key} is {new.get(key)}, but {old[key]} at the base" for key in unequal]
        lines = [f"not comparable: {line}" for line in lines]
        return 2, [*notices, *lines, "gate: FAILED: the evaluation sets differ"]
    if found := not_finite(now) + broken_limits(limits, before, now, Pairs(base, head)):
        lines = [f"broken: {line}" for line in found]
        return 1, [*notices, *lines, f"gate: FAILED: {len(found)} broken"]
    notices.append(f"notice: metrics are consistent with {DVC_LOCK}; only a run can confirm both")
    count = sum(map(len, limits.values()))
    return 0, [*notices, f"gate: passed: {count} metrics within the limits of {GATE}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="revision to compare HEAD with")
    arguments = parser.parse_args()
    try:
        base, head = Revision(arguments.base), Revision("HEAD")
        status, lines = judge(base, head)
        uncommitted = git("status", "--porcelain", "--", "metrics", DVC_LOCK, PARAMS)
    except StageError as error:
        fail("gate", f"FAILED: {error}")
    print(f"gate: {head.commit[:10]} against {on_screen(base.name)} ({base.commit[:10]})")
    if uncommitted:
        print("notice: uncommitted changes are not judged")
    print("\n".join(map(on_screen, lines)))
    sys.exit(status)


if __name__ == "__main__":
    main()
