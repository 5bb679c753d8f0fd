"""Rate and memory of `prepare` on a million rows, against datasets.map with the tokenizer.

    python -m benchmarks.prepare --work DIR               # all sides, a million rows
    python -m benchmarks.prepare --work DIR --rows 100000

Needs data/raw and models/tokenizer of the default. The rows repeat its examples with different
numbers in the prompts, so that there are no duplicates. Sides:

    map       datasets.map with the fast tokenizer on already rendered text, and nothing else: with
              threads inside the tokenizer, and with a process for each core
    prepare   all of `python -m stages.prepare`, including the start of the interpreter: reading,
              checking, hashing, splitting, rendering, tokenizing and writing every row
    near      the search for near duplicates alone, on the first 20,000 rows

Rates are rows over wall time, the best of several rounds in which the sides take turns; CPU seconds
are reported too, since the machine may be shared. The peak is the sum of the proportional set sizes
of all processes of a side, sampled five times a second.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import yaml

from stages.shared.outputs import write_sums

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/prepare.json"
NEAR_ROWS = 20_000
MAP = """
import json, os, sys, time
workers = None if sys.argv[1] == "threads" else len(os.sched_getaffinity(0))
os.environ["TOKENIZERS_PARALLELISM"] = "false" if workers else "true"
import datasets
from transformers import AutoTokenizer
datasets.disable_caching()
datasets.disable_progress_bars()
tokenizer = AutoTokenizer.from_pretrained("models/tokenizer")
rows = datasets.load_dataset("json", data_files="rendered.jsonl", split="train", cache_dir="cache")
def tokenize(batch):
    return tokenizer(batch["text"], add_special_tokens=False)
start, cpu = time.perf_counter(), os.times()
made = rows.map(tokenize, batched=True, num_proc=workers, remove_columns=["text"])
end = os.times()
assert len(made) == len(rows)
print(json.dumps({"seconds": time.perf_counter() - start,
                  "cpu_seconds": sum(end[:4]) - sum(cpu[:4])}))
"""
NEAR = """
import json, time
from pathlib import Path
from stages.preparing.recognizing import recognize
from stages.shared.readers import read_file
from stages.preparing.splitting import Store, near_duplicates
store = Store(Path("."))
form = None
for line, row in read_file(Path("near.jsonl")):
    form = form or recognize("auto", None, row, "")
    store.add("near.jsonl", line, form.example(row, ""), "")
store.finish()
start = time.perf_counter()
near_duplicates(store, range(len(store)))
print(json.dumps({"seconds": time.perf_counter() - start}))
"""


def make(work: Path, rows: int) -> None:
    """The workspace: raw rows for `prepare`, and rendered ones for the other side."""
    from transformers import AutoTokenizer

    for name in ("stages", "templates"):
        shutil.copytree(ROOT / name, work / name, dirs_exist_ok=True)
    shutil.copytree(ROOT / "models/tokenizer", work / "models/tokenizer", dirs_exist_ok=True)
    (work / "data/raw").mkdir(parents=True, exist_ok=True)
    for name in ("dvc.yaml", "data/raw/source.json"):
        shutil.copyfile(ROOT / name, work / name)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["prepare"] |= {"train_rows": None, "max_length": 1024}
    (work / "params.yaml").write_text(yaml.safe_dump(params))
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models/tokenizer")
    examples = [json.loads(line) for line in (ROOT / "data/raw/examples.jsonl").open()]
    roles = ("user", "assistant")
    texts = [
        tokenizer.apply_chat_template(
            [
                {"role": r, "content": t}
                for r, t in zip(roles, ("{}", e["completion"]), strict=True)
            ],
            tokenize=False,
        )
        for e in examples
    ]
    with (
        (work / "data/raw/rows.jsonl").open("w") as raw,
        (work / "rendered.jsonl").open("w") as rendered,
        (work / "near.jsonl").open("w") as near,
    ):
        for i in range(rows):
            example, text = examples[i % len(examples)], texts[i % len(examples)]
            prompt = f"{example['prompt']} (case {i // len(examples)})"
            line = json.dumps({**example, "prompt": prompt}) + "\n"
            raw.write(line)
            rendered.write(json.dumps({"text": text.replace("{}", prompt, 1)}) + "\n")
            if i < NEAR_ROWS:
                near.write(line)
    write_sums(work / "data/raw")


def run(work: Path, *command: str) -> dict:
    """Run Python with `command`: wall and CPU seconds, peak GB, and its last line as JSON."""
    before, start, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as output:
        environment = os.environ | {"HF_HOME": str(work / "hf"), "PYTHONPATH": str(work)}
        process = subprocess.Popen(
            [sys.executable, *command], cwd=work, stdout=output, env=environment
        )
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(0.2)
        seconds = time.perf_counter() - start
        if process.returncode:
            sys.exit(f"a side failed: {' '.join(command)[:60]}")
        output.seek(0)
        last = output.read().strip().splitlines()[-1]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_ram_gb": peak / 1e9,
        **(json.loads(last) if last.startswith("{") else {}),
    }


def memory(pid: int) -> int:
    """Proportional set size of a process and its descendants in bytes; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/smaps_rollup").read_text().split()
        tasks = Path(f"/proc/{pid}/task").iterdir()
        children = " ".join((task / "children").read_text() for task in tasks).split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    own = int(fields[fields.index("Pss:") + 1]) * 1024
    return own + sum(memory(int(child)) for child in children)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    work = options.work.resolve()
    make(work, options.rows)
    sides = {
        "map-threads": ("-c", MAP, "threads"),
        "map-processes": ("-c", MAP, "processes"),
        "prepare": ("-m", "stages.prepare"),
    }
    found: dict[str, list[dict]] = {name: [] for name in sides}
    load = os.getloadavg()[0]
    for _ in range(options.rounds):
        for name, command in sides.items():
            found[name].append(run(work, *command))
            print(name, {k: round(v, 2) for k, v in found[name][-1].items()}, flush=True)
    best = {name: min(runs, key=lambda r: r["seconds"]) for name, runs in found.items()}
    near = run(work, "-c", NEAR)
    rates = {f"{name}_rows_per_second": options.rows / r["seconds"] for name, r in best.items()}
    fastest = min(best["map-threads"], best["map-processes"], key=lambda r: r["seconds"])
    least_cpu = min(best[name]["cpu_seconds"] for name in ("map-threads", "map-processes"))
    result = {
        "rows": options.rows,
        "rounds": options.rounds,
        **rates,
        "near_duplicates_rows_per_second": min(options.rows, NEAR_ROWS) / near["seconds"],
        "prepare_to_map_percent": 100 * fastest["seconds"] / best["prepare"]["seconds"],
        "prepare_to_map_cpu_percent": 100 * least_cpu / best["prepare"]["cpu_seconds"],
        "prepare_cpu_seconds": best["prepare"]["cpu_seconds"],
        "map_cpu_seconds": least_cpu,
        "prepare_peak_ram_gb": max(r["peak_ram_gb"] for r in found["prepare"]),
        "map_peak_ram_gb": fastest["peak_ram_gb"],
        "data_mb": (work / "data/raw/rows.jsonl").stat().st_size / 1e6,
        "cores": len(os.sched_getaffinity(0)),
        "load_average_before": load,
        "load_average_after": os.getloadavg()[0],
        "machine": platform.machine(),
        "date": datetime.now(UTC).date().isoformat(),
        **{n: importlib.metadata.version(n) for n in ("datasets", "tokenizers", "transformers")},
    }
    result = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in result.items()}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
