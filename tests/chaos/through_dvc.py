"""Kill `dvc repro` itself, again and again, until it comes to its end all the same."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

from kills import TIMINGS, Kill, contents, stages
from tiny import make_workspace

# Made of timings, so they differ between any two runs; kills.py compares them with inputs alike.
MADE_OF_TIMINGS = {
    "metrics/summary.json",
    "metrics/report.md",
    "metrics/report.html",
    "metrics/memory.csv",
    "models/release/README.md",
    "models/release/SHA256SUMS",
}


def results(folder: Path) -> dict[str, bytes]:
    outs = [out for paths in stages(folder).values() for out in paths if out not in TIMINGS]
    found = contents(folder, outs)
    return {name: found[name] for name in found.keys() - MADE_OF_TIMINGS}


def repro(folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        ["dvc", "repro"],
        cwd=folder,
        env=os.environ | {"CHECKPOINT_SECONDS": "0", "DVC_NO_ANALYTICS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def running(folder: Path) -> list[str]:
    """The stages of `folder` that run now."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            module = next((word.decode() for word in words if word.startswith(b"stages.")), None)
            if module and (process / "cwd").resolve() == folder.resolve():
                found.append(module.removeprefix("stages."))
    return found


def kill_in_every_stage(folder: Path, seed: int) -> list[Kill]:
    """Kill `dvc repro` once while each stage runs, in one workspace; the end must be the same."""
    draw = random.Random(seed)
    undisturbed = make_workspace(folder / "undisturbed", git=True)
    disturbed = folder / "disturbed"
    shutil.copytree(undisturbed, disturbed)
    finish(undisturbed)
    kills = []
    for i, name in enumerate(stages(disturbed)):
        process = repro(disturbed)
        while name not in running(disturbed) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 4))
        counted = name in running(disturbed)
        whom = ("dvc alone", "dvc and the stage")[i % 2]
        with contextlib.suppress(ProcessLookupError):
            if whom == "dvc alone":
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        # A stage that outlives dvc has to end by itself.
        while running(disturbed):
            time.sleep(0.01)
        kills.append(Kill(f"dvc repro: {name}", f"{whom}, at a random moment", counted, False))
    finish(disturbed)
    alike = results(disturbed) == results(undisturbed)
    for kill in kills:
        kill.identical = alike
    return kills


def finish(folder: Path) -> None:
    process = repro(folder)
    said = process.communicate()[0]
    assert process.returncode == 0, said
