"""Startup time of each stage: Python, checks and imports.

    python -m benchmarks.startup
    python -m benchmarks.startup --rounds 9

Runs each stage's script without the call of main(). The stages take turns; medians over rounds.
CPU seconds are reported beside wall time, since the machine may be shared.
Writes benchmarks/results/startup.json.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import yaml

from stages.shared.device import pick_device
from stages.shared.provenance import provenance

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/startup.json"
START = """
import sys
from pathlib import Path
file = f"stages/{sys.argv.pop()}.py"
script = Path(file).read_text(encoding="utf-8")
script = script[:script.rindex("if __name__ ==")]
exec(compile(script, file, "exec"), {"__name__": "__main__"})
"""


def start(stage: str) -> tuple[float, float]:
    """Wall and CPU seconds until `stage` would call main()."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-c", START, stage], cwd=ROOT, check=True)
    seconds, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    stages = list(yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"])
    for stage in stages:
        start(stage)  # or the first round would measure the disk
    runs = [{stage: start(stage) for stage in stages} for _ in range(rounds)]
    medians = {
        stage: [statistics.median(run[stage][i] for run in runs) for i in range(2)]
        for stage in stages
    }
    result = {
        "seconds": {stage: round(seconds, 2) for stage, (seconds, _) in medians.items()},
        "cpu_seconds": {stage: round(cpu, 2) for stage, (_, cpu) in medians.items()},
        "total_cpu_seconds": round(sum(cpu for _, cpu in medians.values()), 1),
        "rounds": rounds,
        "load_average": os.getloadavg()[0],
        "date": datetime.now(UTC).date().isoformat(),
        **provenance(pick_device()),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
