"""Fail when a commit loses quality against another one. For CI and for reviewers.

    python -m tools.gate --base origin/main

Judges what is committed at HEAD; limits are those of gate.yaml at the base, so that the change
under review cannot move them. Needs neither a GPU, nor a DVC remote, nor a run.
Exit status: 0 passed, 1 a limit broke, 2 nothing could be judged.
"""

import argparse
import math
import sys
from typing import Any, TypeGuard

from tools.revision import DVC_LOCK, DVC_YAML, PARAMS, Revision, fail, git

LIMITS = "gate.yaml"
RULES = ("may_rise_percent", "may_fall_percent", "at_most", "at_least")
EVAL = "metrics/eval.json"
SET_KEYS = ("eval_tokens", "eval_set_sha256")


def is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_limits(limits: dict) -> None:
    """Raises ValueError for a part of gate.yaml that is no mapping, or a rule that is not known."""
    for path, keys in limits.items():
        if not isinstance(keys, dict):
            raise ValueError(f"{LIMITS}: {path}: not a mapping")
        for key, rules in keys.items():
            if not isinstance(rules, dict):
                raise ValueError(f"{LIMITS}: {path}: {key}: not a mapping")
            for rule, value in rules.items():
                if rule not in RULES or not is_number(value):
                    raise ValueError(
                        f"{LIMITS}: {path}: {key}: {rule}: {value}: "
                        f"a rule is one of {', '.join(RULES)} with a number"
                    )


def broken_limits(limits: dict, base: dict[str, dict], head: dict[str, dict]) -> list[str]:
    """One line for each limit that the metrics of `head` break, with by how much.

    `base` and `head` map a metrics file to its values. A limit on a change needs the base's value
    and holds nothing where the base has none.
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
                found += [
                    f"{path}: {key} {line}"
                    for rule, value in rules.items()
                    if (line := broken(rule, value, before, now))
                ]
    return found


def broken(rule: str, limit: float, before: float | None, now: float) -> str | None:
    """What is wrong with `now` under one rule, or None."""
    if rule == "at_most" and now > limit:
        return f"is {now:g}; at most {limit:g} is allowed"
    if rule == "at_least" and now < limit:
        return f"is {now:g}; at least {limit:g} is demanded"
    if not rule.startswith("may_") or not is_number(before) or not math.isfinite(before):
        return None
    change = now - before if rule == "may_rise_percent" else before - now
    if change <= abs(before) * limit / 100:
        return None
    percent = f"{100 * change / abs(before):.2f} %" if before else f"{change:g} from 0"
    verb = "rose" if rule == "may_rise_percent" else "fell"
    return f"{verb} by {percent}, from {before:g} to {now:g}; {limit:g} % is allowed"


def not_finite(head: dict[str, dict]) -> list[str]:
    return [
        f"{path}: {key} is {value}"
        for path, values in head.items()
        for key, value in values.items()
        if is_number(value) and not math.isfinite(value)
    ]


def unequal_sets(base: dict, head: dict) -> list[str]:
    """Differences between the evaluation sets of two eval.json, which forbid a comparison."""
    return [
        f"{EVAL}: {key} is {head.get(key)}, but {base[key]} at the base"
        for key in base
        if key.endswith(SET_KEYS) and head.get(key) != base[key]
    ]


def redefined(stage: dict, entry: dict) -> list[str]:
    """Parts of a stage in dvc.yaml that differ from its last run, its entry in dvc.lock."""

    def declared(*kinds: str) -> set[str]:
        listed = (one for kind in kinds for one in stage.get(kind, []))
        return {one if isinstance(one, str) else next(iter(one)) for one in listed}

    def recorded(kind: str) -> set[str]:
        return {one["path"] for one in entry.get(kind, [])}

    parts = {
        "command": (stage.get("cmd"), entry.get("cmd")),
        "deps": (declared("deps"), recorded("deps")),
        "params": (declared("params"), set(entry.get("params", {}).get(PARAMS, {}))),
        "outs": (declared("outs", "metrics", "plots"), recorded("outs")),
    }
    return [part for part, (now, then) in parts.items() if now != then]


def edited(path: str, base: Revision, head: Revision) -> bool:
    """Whether the committed file `path`, or one below the folder `path`, differs."""
    files = {file for file in base.files | head.files if f"{file}/".startswith(f"{path}/")}
    return any(base.md5(file) != head.md5(file) for file in files)


def unvouched(revision: Revision, base: Revision) -> list[str]:
    """What is committed but not what dvc.lock recorded: metrics, code, parameters, or the chain.

    Anyone can type a number into a metrics file; DVC wrote each file's MD5 after running a stage.
    A folder may hold files that Git ignores, so that its hash cannot be had from a commit: one
    whose committed files changed since `base` must have another hash than at `base`.
    """
    lock = revision.yaml(DVC_LOCK).get("stages", {})
    params = revision.yaml(PARAMS)
    made = {out["path"]: out["md5"] for entry in lock.values() for out in entry.get("outs", [])}
    before = {
        dep["path"]: dep["md5"]
        for entry in base.yaml(DVC_LOCK).get("stages", {}).values()
        for dep in entry.get("deps", [])
    }
    found = []
    for path in revision.declared("metrics", "plots"):
        actual = revision.md5(path)
        if actual != made.get(path):
            what = "missing" if actual is None else "not what dvc.lock recorded"
            found.append(f"{path} is {what}")
    for name, stage in revision.yaml(DVC_YAML).get("stages", {}).items():
        if name not in lock:
            found.append(f"stage {name} has never run: it is not in dvc.lock")
            continue
        for part in redefined(stage, lock[name]):
            found.append(f"stage {name} ran with other {part} than {DVC_YAML} has")
        for dep in lock[name].get("deps", []):
            path = dep["path"]
            expected = made.get(path) or revision.md5(path)
            if expected is None:
                stale = before.get(path) == dep["md5"] and edited(path, base, revision)
            else:
                stale = expected != dep["md5"]
            if stale:
                found.append(f"stage {name} ran with another {path}")
        for key, value in lock[name].get("params", {}).get(PARAMS, {}).items():
            if params.get(key) != value:
                found.append(f"stage {name} ran with another {key} in {PARAMS}")
    return found


def metrics(revision: Revision) -> dict[str, dict]:
    """Metrics file -> its values, for every file that dvc.yaml declares and the commit has."""
    values = {path: revision.json(path) for path in revision.declared("metrics")}
    return {path: value for path, value in values.items() if value is not None}


def judge(base: Revision, head: Revision) -> tuple[int, list[str]]:
    """Exit status and the lines that explain it."""
    notices = []
    limits = base.yaml(LIMITS)
    if not limits:
        notices.append(f"notice: no {LIMITS} at {base.name}; the limits are HEAD's own")
        limits = head.yaml(LIMITS)
    if not limits:
        raise ValueError(f"{LIMITS}: no limits, neither at {base.name} nor at HEAD; write some")
    check_limits(limits)
    before, now = metrics(base), metrics(head)
    if EVAL not in before:
        notices.append(f"notice: {base.name} has no {EVAL} yet; there is nothing to compare with")
        if not now:
            return 0, [*notices, "gate: passed: neither revision has metrics"]
    if unjudged := unvouched(head, base):
        lines = [f"not vouched for: {line}; run dvc repro and commit" for line in unjudged]
        return 2, [*notices, *lines, "gate: FAILED: dvc.lock does not vouch for these metrics"]
    if unequal := unequal_sets(before.get(EVAL, {}), now.get(EVAL, {})):
        lines = [f"not comparable: {line}" for line in unequal]
        return 2, [*notices, *lines, "gate: FAILED: the evaluation sets differ"]
    if found := not_finite(now) + broken_limits(limits, before, now):
        lines = [f"broken: {line}" for line in found]
        return 1, [*notices, *lines, f"gate: FAILED: {len(found)} broken"]
    count = sum(map(len, limits.values()))
    return 0, [*notices, f"gate: passed: {count} metrics within the limits of {LIMITS}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="revision to hold HEAD against")
    arguments = parser.parse_args()
    try:
        base, head = Revision(arguments.base), Revision("HEAD")
        status, lines = judge(base, head)
    except (LookupError, ValueError) as error:
        fail("gate", f"FAILED: {error}")
    print(f"gate: {head.commit[:10]} against {base.name} ({base.commit[:10]})")
    if git("status", "--porcelain", "metrics", DVC_LOCK, PARAMS).stdout:
        print("notice: uncommitted changes are not judged")
    print("\n".join(lines))
    sys.exit(status)


if __name__ == "__main__":
    main()
