"""Measure how far the metrics of the same settings lie apart by luck, for tools/compare.py.

    python -m tools.noise --seeds 1 2 3

Repeats the committed pipeline with other seeds, each in a copy of its own (`dvc exp run --temp`,
so the workspace is untouched), and writes benchmarks/results/noise.json. Only what depends on the
seed runs: about ten minutes a seed for the default on two CPU cores. The committed run counts too.
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

from tools.gate import is_number, metrics
from tools.revision import PARAMS, Revision, fail, git

RESULT = Path("benchmarks/results/noise.json")
# Repeats the others.
SUMMARY = "metrics/summary.json"
DVC = (sys.executable, "-m", "dvc")
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "dvc")
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
STUDENT_T = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def run_seed(seed: int) -> str:
    """Run the committed pipeline with `seed`; the name of the experiment that holds the result."""
    name = f"noise-{seed}"
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
        fail("noise", f"the run with seed {seed} failed; its message stands above")
    return name


def experiment(head: Revision, name: str) -> Revision:
    """DVC keeps an experiment under the commit that it began at; others may have the same name."""
    return Revision(f"refs/exps/{head.commit[:2]}/{head.commit[2:]}/{name}")


def spread(values: list[float]) -> dict:
    """Mean of 3 to 10 runs and the noise: how far two single runs lie apart by luck, at 95 %.

    That is t(n - 1) * sqrt(2) * s, with the standard deviation s of the n runs.
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
            values = [v for run in runs if is_number(v := run.get(path, {}).get(key))]
            if len(values) == len(runs) and len(set(values)) > 1:
                keys[key] = spread(values)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    seeds = parser.parse_args().seeds
    head = Revision("HEAD")
    if git("status", "--porcelain", "--untracked-files=no").stdout:
        fail("noise", "commit your changes first: the noise is that of a commit")
    committed = head.yaml(PARAMS)["seed"]
    if committed in seeds or len(set(seeds)) != len(seeds) or not 2 <= len(seeds) <= 9:
        fail("noise", f"give 2 to 9 different seeds other than {committed}, which is committed")
    print(f"noise: {len(seeds)} runs beside the committed one, seeds {seeds}")
    names = [run_seed(seed) for seed in seeds]
    runs = [metrics(run) for run in (head, *(experiment(head, name) for name in names))]
    result = {
        "command": " ".join(["python -m tools.noise", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "commit": head.commit,
        "device": runs[0]["metrics/train_cost.json"]["device"],
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "seeds": [committed, *seeds],
        "metrics": spreads(runs),
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    subprocess.run([*DVC, "exp", "remove", "--quiet", *names], check=True)
    print(f"noise: written to {RESULT}; commit it")


if __name__ == "__main__":
    main()
