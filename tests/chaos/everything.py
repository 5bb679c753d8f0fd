"""Disturb the pipeline in every way that is known; write benchmarks/results/chaos.json.

    make chaos                  # all parts, one after the other
    make chaos PART=writes      # one of them, of the names in MINUTES; others keep their results

Kills every stage of a tiny pipeline at chosen and random instants, `dvc repro` itself at a moment
and while it writes, the workers of prepare and the queue, runs what was killed again, and compares
every output but timings byte for byte with an undisturbed run. Then gives stages the malformed
parameters and data that the tests keep, and to what reads the files of others what hostile.py
writes.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import bad_inputs
import bad_params
import hostile
import kills
import quick
import through_dvc
from prepare_folder import make_folder
from tiny import ROOT, make_workspace

RESULT = ROOT / "benchmarks/results/chaos.json"
SEED = 8
CHOSEN, AT_RANDOM = 12, 12
# About what each part takes on two quiet cores.
MINUTES = {
    "stages": 9,
    "dvc": 20,
    "workers": 3,
    "writes": 15,
    "queue": 10,
    "inputs": 3,
    "hostile": 6,
}
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "dvc")


def finish(folder: Path) -> Path:
    """A tiny workspace in which every stage has run."""
    make_workspace(folder)
    for name in kills.stages(folder):
        quick.run(name, folder)
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file but logs and locks."""
    skipped = {".log", ".lock", ".pyc"}
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in skipped)
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def try_bad_params(finished: Path) -> list[bool]:
    """Whether each bad file is refused by a stage: its lines, exit status 1, nothing touched."""
    params, names, clear = finished / "params.yaml", list(kills.stages(finished)), []
    kept, before = params.read_bytes(), snapshot(finished)
    for i, (_, text, lines) in enumerate(bad_params.TABLE):
        params.write_text(text, encoding="utf-8")
        command = [sys.executable, "-B", "-m", f"stages.{names[i % len(names)]}"]
        done = subprocess.run(command, cwd=finished, capture_output=True, text=True, check=False)
        said = done.stderr.splitlines() == [f"params.yaml: {line}" for line in lines]
        params.write_bytes(kept)
        clear.append(said and done.returncode == 1 and snapshot(finished) == before)
    return clear


def try_bad_inputs(finished: Path, folder: Path) -> list[bool]:
    """The same of bad data given to prepare."""
    clear = []
    for bad in bad_inputs.BAD_INPUTS:
        shutil.rmtree(folder, ignore_errors=True)
        make_folder(folder, {bad.file: bad.content()}, **bad.params)
        shutil.copytree(finished / "stages", folder / "stages")
        shutil.copy(finished / "dvc.yaml", folder)
        before = snapshot(folder)
        stage = quick.Stage("prepare", folder)
        status, last = stage.wait(), stage.said.splitlines()[-1]
        one_line = last.startswith("prepare: ") and bad.message in last
        one_line = one_line and "Traceback" not in stage.said
        clear.append(one_line and status == 1 and snapshot(folder) == before)
        if not clear[-1]:
            print(f"not clear: {bad.name}: {last}", flush=True)
    return clear


def report(kill: kills.Kill) -> None:
    words = ["identical" if kill.identical else "LOST"]
    words += ["STUCK"] * kill.stuck + ["TRACEBACK"] * kill.traceback
    words += ["not counted"] * (not kill.counted)
    print(f"{kill.stage}: killed {kill.instant}: {', '.join(words)}", flush=True)


def of_kills(found: Iterable[kills.Kill]) -> dict:
    """What a part of kills adds to the result."""
    all_ = []
    for kill in found:
        report(kill)
        all_.append(kill)
    counted = [kill for kill in all_ if kill.counted]
    return {
        "kills": len(counted),
        "identical": sum(kill.identical for kill in counted),
        "lost": sum(not kill.identical for kill in all_),
        "stuck": sum(kill.stuck for kill in all_),
        "tracebacks": sum(kill.traceback for kill in all_),
        "kills_by_stage": Counter(kill.stage for kill in counted),
        "instants": [f"{kill.stage}: {kill.instant}" for kill in counted],
        "too_late_to_count": len(all_) - len(counted),
    }


def of_inputs(folder: Path) -> dict:
    finished = finish(folder / "finished")
    params, inputs = try_bad_params(finished), try_bad_inputs(finished, folder / "bad")
    return {
        "bad_params": len(params),
        "bad_inputs": len(inputs),
        "clear_errors": sum(params) + sum(inputs),
    }


def of_hostile(folder: Path) -> dict:
    tried = hostile.try_all(hostile.cases(), folder / "hostile")
    for case, outcome in tried:
        if outcome.fault:
            print(f"{case.kind}: {case.name}: {outcome.fault}", flush=True)
    return hostile.counts(tried)


def of_part(name: str, folder: Path) -> dict:
    started = time.monotonic()
    if name == "inputs":
        made = of_inputs(folder)
    elif name == "hostile":
        made = of_hostile(folder)
    elif name == "stages":
        finished = finish(folder / "finished")
        made = of_kills(kills.rounds(finished, folder / "killed", CHOSEN, AT_RANDOM, SEED))
    else:
        made = of_kills(through_dvc.parts(folder, SEED)[name])
    made["minutes"] = round((time.monotonic() - started) / 60, 1)
    made["date"] = datetime.date.today().isoformat()
    return made


def total(parts: dict[str, dict]) -> dict:
    """The results of all parts, added up by key; the latest date."""
    sums: dict[str, Any] = {}
    for part in parts.values():
        for key, value in part.items():
            if key == "date":
                sums[key] = max(sums.get(key, ""), value)
            elif isinstance(value, dict):
                sums[key] = sums.get(key, {}) | value
            else:
                sums[key] = value + sums[key] if key in sums else value
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(MINUTES)}; all when none is named")
    names = parser.parse_args().parts or list(MINUTES)
    if unknown := set(names) - set(MINUTES):
        parser.error(
            f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(MINUTES)}"
        )
    minutes = sum(MINUTES[name] for name in names)
    print(f"chaos: {', '.join(names)}: about {minutes} minutes on two quiet cores", flush=True)
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for role in ("AUTHOR", "COMMITTER"):
        os.environ |= {f"GIT_{role}_NAME": "chaos", f"GIT_{role}_EMAIL": "chaos@example.com"}
    before = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    parts = before.get("parts", {})
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            parts[name] = of_part(name, Path(scratch))
        result = total(parts) | {
            "command": "make chaos",
            "seed": SEED,
            "device": f"CPU, {len(os.sched_getaffinity(0))} cores, {platform.machine()}",
            "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
            "parts": parts,
        }
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    shown = {key: value for key, value in result.items() if key not in ("instants", "parts")}
    print(json.dumps(shown, indent=1))
    faults = [result.get(key, 0) for key in ("lost", "stuck", "tracebacks", "hangs", "escapes")]
    tried = result.get("bad_params", 0) + result.get("bad_inputs", 0)
    if any(faults) or result.get("clear_errors", 0) < tried:
        sys.exit("chaos: something was lost, stuck or told with a traceback, or steered the screen")
