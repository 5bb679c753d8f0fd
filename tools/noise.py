"""Measure how much metrics vary with the seed, for tools/compare.py.

    python -m tools.noise --seeds 1 2 3

Repeats the committed pipeline with other seeds, each in a copy (`dvc exp run --temp`), and writes
benchmarks/results/noise.json. Only what depends on the seed runs: about ten minutes a seed for the
default on two CPU cores. The committed run counts as one more.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, TypeGuard

from pydantic import Field, TypeAdapter

from stages.shared.process import StageError
from tools.gate import EVAL, SET_KEYS, is_number
from tools.revision import Revision, git
from tools.schemas import Part
from tools.screen import fail

RESULT = Path("benchmarks/results/noise.json")
# A summary of the others.
SUMMARY = "metrics/summary.json"
DATA, COST = "metrics/data.json", "metrics/train_cost.json"
# The seed itself, and limits that do not change a result.
NO_SETTINGS = ("seed", "plan")
DVC = (sys.executable, "-m", "dvc")
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "dvc")
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
STUDENT_T = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


class Conditions(Part):
    """What noise depends on: parameters by dotted names, and metrics of the data."""

    params: dict[str, Any]
    data: dict[str, Any]


class Spread(Part):
    noise_percent: Annotated[float, Field(ge=0)]


class Noise(Part):
    """The part of RESULT that other tools read."""

    commit: str
    device: str
    seeds: list[int]
    # Older versions of this tool did not write it.
    measured_on: Conditions | None = None
    metrics: dict[str, dict[str, Spread]]


NOISE = TypeAdapter(Noise)


def run_seed(seed: int, name: str) -> None:
    """Run the committed pipeline with `seed` as the experiment `name`."""
    command = [
        *DVC,
        "exp",
        "run",
        "--temp",
        "--force",
        "--name",
        name,
        "--set-param",
        f"seed={seed}",
    ]
    if subprocess.run(command, check=False).returncode:
        raise StageError(f"the run with seed {seed} failed; see its message above")


def experiment(head: Revision, name: str) -> Revision:
    """The experiment `name` that started at `head`; other commits may have one of that name."""
    return Revision(f"refs/exps/{head.commit[:2]}/{head.commit[2:]}/{name}")


def spread(values: list[float]) -> dict:
    """Mean of n = 3 to 10 runs, and the noise: the 95 % bound on the difference of two runs.

    That is t(n - 1) * sqrt(2) * s, with the standard deviation s of the runs.
    """
    mean = statistics.fmean(values)
    noise = STUDENT_T[len(values) - 1] * math.sqrt(2) * statistics.stdev(values)
    percent = 100 * noise / abs(mean) if mean else 0.0
    return {"values": values, "mean": mean, "noise_percent": float(f"{percent:.4g}")}


def spreads(runs: list[dict[str, dict]]) -> dict[str, dict]:
    """Metrics file -> key -> spread, for every number that all runs have and that varies."""
    found: dict[str, dict] = {path: {} for path in runs[0] if path != SUMMARY}
    for path, keys in found.items():
        for key in runs[0][path]:
            values = [v for run in runs if is_finite(v := run.get(path, {}).get(key))]
            if len(values) == len(runs) and len(set(values)) > 1:
                keys[key] = spread(values)
    return found


def is_finite(value: Any) -> TypeGuard[int | float]:
    return is_number(value) and math.isfinite(value)


def conditions(revision: Revision) -> Conditions:
    """The conditions of a run, passed through JSON so that they compare equal to stored ones."""
    params = {
        key: value
        for key, value in revision.settings.items()
        if key.partition(".")[0] not in NO_SETTINGS
    }
    data = {f"data.{key}": value for key, value in revision.metrics.get(DATA, {}).items()}
    for key, value in revision.metrics.get(EVAL, {}).items():
        if key.endswith(SET_KEYS):
            data[f"eval.{key}"] = value
    facts = json.dumps({"params": params, "data": data}, default=str)
    return Conditions.model_validate_json(facts)


def measure(head: Revision, names: dict[int, str]) -> dict:
    """Run each seed as the experiment of that name; the content of RESULT."""
    for seed, name in names.items():
        run_seed(seed, name)
    runs = [head.metrics, *(experiment(head, name).metrics for name in names.values())]
    return {
        "command": " ".join(["python -m tools.noise", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "commit": head.commit,
        "device": str(head.metrics.get(COST, {}).get("device")),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "seeds": [head.params.get("seed"), *names],
        "measured_on": conditions(head).model_dump(),
        "metrics": spreads(runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    seeds = parser.parse_args().seeds
    names = {seed: f"noise-{seed}" for seed in seeds}
    try:
        head = Revision("HEAD")
        if git("status", "--porcelain", "--untracked-files=no"):
            raise StageError("commit your changes first: noise is measured for a commit")
        committed = head.params.get("seed")
        if committed in seeds or len(names) != len(seeds) or not 2 <= len(seeds) <= 9:
            raise StageError(
                f"give 2 to 9 different seeds other than {committed}, which is committed"
            )
        print(f"noise: {len(seeds)} runs beside the committed one, seeds {seeds}")
        result = measure(head, names)
    except StageError as error:
        fail("noise", error)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"noise: wrote {RESULT}; commit it", flush=True)
    sys.exit(subprocess.call([*DVC, "exp", "remove", "--quiet", *names.values()]))


if __name__ == "__main__":
    main()
