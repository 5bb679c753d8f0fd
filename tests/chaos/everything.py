"""Disturb the pipeline in every way that is known; write benchmarks/results/chaos.json.

    make chaos

Kills every stage of a tiny pipeline at chosen and random instants, and `dvc repro` itself, runs
what was killed again, and compares every output but timings byte for byte with an undisturbed
run. Then gives stages the malformed parameters and data that the tests keep, and to what reads
the files of others what hostile.py writes.
"""

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
from pathlib import Path

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
    word = "identical" if kill.identical else "LOST"
    note = word if kill.counted else f"{word}, too late to count"
    print(f"{kill.stage}: killed {kill.instant}: {note}", flush=True)


def main() -> None:
    started = time.monotonic()
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for role in ("AUTHOR", "COMMITTER"):
        os.environ |= {f"GIT_{role}_NAME": "chaos", f"GIT_{role}_EMAIL": "chaos@example.com"}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        finished = finish(folder / "finished")
        found = []
        for kill in kills.rounds(finished, folder / "killed", CHOSEN, AT_RANDOM, SEED):
            report(kill)
            found.append(kill)
        for kill in through_dvc.kill_in_every_stage(folder / "dvc", SEED):
            report(kill)
            found.append(kill)
        params = try_bad_params(finished)
        inputs = try_bad_inputs(finished, folder / "bad")
        tried = hostile.try_all(hostile.cases(), folder / "hostile")
    for case, outcome in tried:
        if outcome.fault:
            print(f"{case.kind}: {case.name}: {outcome.fault}", flush=True)
    harm = hostile.counts(tried)
    counted = [kill for kill in found if kill.counted]
    lost = [kill for kill in found if not kill.identical]
    result = {
        "kills": len(counted),
        "identical": sum(kill.identical for kill in counted),
        "bad_params": len(params),
        "bad_inputs": len(inputs),
        "clear_errors": sum(params) + sum(inputs),
        **harm,
        "lost": len(lost),
        "kills_by_stage": Counter(kill.stage for kill in counted),
        "instants": [f"{kill.stage}: {kill.instant}" for kill in counted],
        "too_late_to_count": len(found) - len(counted),
        "minutes": round((time.monotonic() - started) / 60, 1),
        "command": "make chaos",
        "seed": SEED,
        "date": datetime.date.today().isoformat(),
        "device": f"CPU, {len(os.sched_getaffinity(0))} cores, {platform.machine()}",
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "instants"}, indent=1))
    if (
        lost
        or any(outcome.fault for _, outcome in tried)
        or sum(params) < len(params)
        or sum(inputs) < len(inputs)
    ):
        sys.exit("chaos: something was lost, or an error was not clear")
