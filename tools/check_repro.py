"""Hold a fresh run of the pipeline against what is committed. For CI, after `make repro`.

    python -m tools.check_repro

Equal: commands, parameters, code, fetched and prepared data, the plan. Within TOLERANCE: quality
metrics, since another CPU rounds otherwise. Timings and weights are not compared.
"""

import json
import subprocess
import sys
from pathlib import Path

import yaml

TOLERANCE = 0.05
EXACT_OUTS = ("data/raw", "data/prepared", "models/base", "models/tokenizer", "models/plan.ok")
EXACT_METRICS = ("metrics/data.json", "metrics/plan.json")
CLOSE_METRICS = ("metrics/train.json", "metrics/eval.json")


def committed(path: str) -> str:
    command = ["git", "show", f"HEAD:{path}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def lock_differences(old: dict, new: dict) -> list[str]:
    """Stages whose command, parameters, code or exact outputs are not those of dvc.lock."""
    found = []
    for name in sorted(old["stages"].keys() | new["stages"].keys()):
        before, after = old["stages"].get(name), new["stages"].get(name)
        if before is None or after is None:
            found.append(f"{name}: only in {'the new run' if before is None else 'dvc.lock'}")
            continue
        found += [
            f"{name}: {key}" for key in ("cmd", "params") if before.get(key) != after.get(key)
        ]
        for kind in ("deps", "outs"):
            hashes = [{e["path"]: e["md5"] for e in side.get(kind, [])} for side in (before, after)]
            for path in sorted(hashes[0].keys() | hashes[1].keys()):
                exact = path.endswith(".py") or path in EXACT_OUTS + EXACT_METRICS
                missing = path not in hashes[0] or path not in hashes[1]
                if missing or (exact and hashes[0][path] != hashes[1][path]):
                    found.append(f"{name}: {path}")
    return found


def metric_differences(old: dict, new: dict, tolerance: float) -> list[str]:
    """Keys that are missing, or whose values differ by more than `tolerance`, relative."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        close = (
            isinstance(before, int | float)
            and isinstance(after, int | float)
            and abs(after - before) <= tolerance * abs(before)
        )
        if before != after and not close:
            found.append(f"{key}: {before} committed, {after} now")
    return found


def main() -> None:
    old = yaml.safe_load(committed("dvc.lock"))
    found = lock_differences(old, yaml.safe_load(Path("dvc.lock").read_text()))
    for path in EXACT_METRICS + CLOSE_METRICS:
        tolerance = TOLERANCE if path in CLOSE_METRICS else 0.0
        if not Path(path).exists():
            found.append(f"{path}: missing")
            continue
        now = json.loads(Path(path).read_text())
        found += [
            f"{path}: {line}"
            for line in metric_differences(json.loads(committed(path)), now, tolerance)
        ]
    if found:
        sys.exit(
            "Not what is committed; run make repro and commit dvc.lock and metrics:\n"
            + "\n".join(found)
        )
    print(f"The run agrees with what is committed (quality within {TOLERANCE:.0%}).")


if __name__ == "__main__":
    main()
