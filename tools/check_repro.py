"""Compare a fresh run of the pipeline with what is committed. For CI, after `make repro`.

    python -m tools.check_repro

Must be equal: commands, parameters, code, fetched and prepared data, the plan. Quality metrics and
weights must be equal too if both record the same machine and versions (metrics/*_cost.json), except
those of verify. Otherwise metrics must be close, by TOLERANCE and POINTS, and weights are not
compared, since another machine rounds differently. Timings are never compared.
Exit status: 0 they agree, 1 they differ, 2 they could not be compared.
"""

import math
import sys
from typing import Any

from stages.shared.process import StageError
from stages.shared.provenance import made_with
from stages.shared.screen import on_screen
from tools.gate import EVAL, is_number
from tools.revision import DVC_LOCK, Revision
from tools.schemas import Lock
from tools.screen import fail
from tools.versions import RECORDS

TOLERANCE = 0.05
# Absolute tolerances for metrics near zero. A GPU's run of the default differed from a CPU's by
# 0.06 points, 0.0014 and 0.033 nats; a merge on the other base by 1.7 points and 0.19 nats.
POINTS = {
    "perplexity_change_percent": 0.5,
    "retention_perplexity_change_percent": 2.0,
    "merge_change_percent": 0.5,
    "mean_kl": 0.01,
    "max_kl": 0.2,
}
# Equal only on the same machine with the same versions.
COMPUTED_OUTS = (
    "models/quantized",
    "models/adapter",
    "models/merged",
    "metrics/samples.jsonl",
    "metrics/answers.json",
    "metrics/rows.csv",
    "metrics/curve.csv",
)
COSTS = ("_minutes", "ram_gb")
EXACT_OUTS = (
    "data/raw",
    "data/retention",
    "data/prepared",
    "models/base",
    "models/tokenizer",
    "models/plan.ok",
    "metrics/lengths.csv",
)
EXACT_METRICS = ("metrics/data.json", "metrics/plan.json")
# On one machine, verify's products of memory-mapped 16-bit weights rounded differently in one run
# of many, so its figures and export's copies of them are only compared for closeness.
ROUNDED_METRICS = ("metrics/verify.json", "metrics/summary.json")
CLOSE_METRICS = ("metrics/train.json", EVAL, *ROUNDED_METRICS)


def lock_differences(old: Lock, new: Lock, computed: bool) -> list[str]:
    """Stages whose command, parameters, code or exact outputs differ between two dvc.lock files.

    computed  whether computed outputs must be equal as well
    """
    exact_paths = EXACT_OUTS + EXACT_METRICS + (COMPUTED_OUTS if computed else ())
    found = []
    for name in sorted(old.stages.keys() | new.stages.keys()):
        before, after = old.stages.get(name), new.stages.get(name)
        if before is None or after is None:
            found.append(f"{name}: only in {'the new run' if before is None else DVC_LOCK}")
            continue
        for key in ("cmd", "params"):
            if getattr(before, key) != getattr(after, key):
                found.append(f"{name}: {key}")
        for kind in ("deps", "outs"):
            hashes = [{e.path: e.md5 for e in getattr(side, kind)} for side in (before, after)]
            for path in sorted(hashes[0].keys() | hashes[1].keys()):
                exact = path.endswith(".py") or path in exact_paths
                missing = path not in hashes[0] or path not in hashes[1]
                if missing or (exact and hashes[0][path] != hashes[1][path]):
                    found.append(f"{name}: {path}")
    return found


def metric_differences(old: dict, new: dict, tolerance: float) -> list[str]:
    """Keys that are missing or whose values differ too much; `tolerance` is relative."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        points = POINTS.get(key.removeprefix("other_base_"), 0.0) if tolerance else 0.0
        if before != after and not is_close(before, after, tolerance, points):
            found.append(f"{key}: {before} committed, {after} now")
    return found


def without_costs(metrics: dict) -> dict:
    return {key: value for key, value in metrics.items() if not key.endswith(COSTS)}


def is_close(before: Any, after: Any, tolerance: float, points: float) -> bool:
    if not is_number(before) or not is_number(after):
        return False
    return math.isclose(before, after, rel_tol=tolerance, abs_tol=points)


def same_environment(head: Revision, workspace: Revision) -> bool:
    """Whether both record their machine and versions, and these are equal."""
    both = [
        [made_with(side.metrics.get(path) or {}) for path in RECORDS.values()]
        for side in (head, workspace)
    ]
    return both[0] == both[1] and all(both[0])


def differences(head: Revision, workspace: Revision) -> list[str]:
    """Differences between the run in the workspace and what is committed."""
    same = same_environment(head, workspace)
    found = lock_differences(head.lock, workspace.lock, computed=same)
    for path in EXACT_METRICS + CLOSE_METRICS:
        old, new = head.metrics.get(path), workspace.metrics.get(path)
        close = path in ROUNDED_METRICS or (path in CLOSE_METRICS and not same)
        tolerance = TOLERANCE if close else 0.0
        if old is not None and new is not None:
            if path in CLOSE_METRICS:
                old, new = without_costs(old), without_costs(new)
            found += [f"{path}: {line}" for line in metric_differences(old, new, tolerance)]
        elif old != new:
            found.append(f"{path}: missing{'' if new is None else ' in what is committed'}")
    return found


def main() -> None:
    try:
        head, workspace = Revision("HEAD"), Revision(None)
        found = differences(head, workspace)
        how = "to the byte" if same_environment(head, workspace) else f"within {TOLERANCE:.0%}"
    except StageError as error:
        fail("check_repro", error)
    if found:
        lines = "\n".join(map(on_screen, found))
        sys.exit(
            f"Unlike what is committed; run make repro and commit dvc.lock and metrics:\n{lines}"
        )
    print(f"The run agrees with what is committed ({how}).")


if __name__ == "__main__":
    main()
