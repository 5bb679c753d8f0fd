"""The default pipeline on this machine's device, several times, beside the committed CPU metrics.

    python -m benchmarks.default --work DIR

Real weights and data. The stages up to prepare run once in DIR, those from plan to verify in one
copy per run, in parallel, so their times are not meaningful. Writes
benchmarks/results/default.json: perplexities and merge of every run, the spread, and answers.
"""

import argparse
import importlib.metadata
import json
import math
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/default.json"
RUNS = 3
SHARED = ("fetch_model", "fetch_data", "fetch_retention", "prepare")
OWN = ("plan", "quantize", "train", "evaluate", "merge", "verify")
METRICS = ("eval", "verify", "train", "train_cost")
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "liger-kernel")


def run_stages(folder: Path, stages: tuple[str, ...]) -> None:
    with (folder / "log.txt").open("a") as log:
        for stage in stages:
            subprocess.run(
                [sys.executable, "-m", f"stages.{stage}"],
                cwd=folder,
                check=True,
                stdout=log,
                stderr=subprocess.STDOUT,
            )


def metrics(folder: Path) -> dict:
    """The key figures of a run's metrics/, or of the committed ones."""
    found = {}
    for name in METRICS:
        found |= json.loads((folder / f"metrics/{name}.json").read_text(encoding="utf-8"))
    return found


def one_run(work: Path, number: int) -> Path:
    folder = work / f"run-{number}"
    shutil.copytree(work / "shared", folder)
    run_stages(folder, OWN)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work.resolve()
    shared = work / "shared"
    for name in ("stages", "templates"):
        shutil.copytree(ROOT / name, shared / name, dirs_exist_ok=True)
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, shared / name)
    run_stages(shared, SHARED)
    with ThreadPoolExecutor(RUNS) as pool:
        folders = list(pool.map(lambda n: one_run(work, n), range(RUNS)))
    runs, committed = [metrics(folder) for folder in folders], metrics(ROOT)
    tuned = [run["tuned_perplexity"] for run in runs]
    text = (folders[0] / "metrics/samples.jsonl").read_text(encoding="utf-8")
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "committed": committed,
        "runs": runs,
        "spread_percent": 100 * (max(tuned) - min(tuned)) / min(tuned),
        "from_committed_percent": 100
        * (math.fsum(tuned) / RUNS / committed["tuned_perplexity"] - 1),
        "samples": [json.loads(line) for line in text.splitlines()],
    }
    RESULTS.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in result.items() if k != "samples"}, indent=1))


if __name__ == "__main__":
    main()
