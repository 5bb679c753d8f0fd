"""Kill `dvc repro`, its stages, their workers and its queue, again and again.

What `make repro` does (tools.recover, then dvc repro) must come to its end all the same, with the
bytes of an undisturbed run. Kills are chained: each comes upon what those before left behind, and
the bytes are compared after every ten or sooner.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import stubs
from kills import TIMINGS, Kill, contents, stages
from tiny import make_rows, make_workspace

# Made of timings, so they differ between any two runs; kills.py compares them with inputs alike.
MADE_OF_TIMINGS = {
    "metrics/summary.json",
    "metrics/report.md",
    "metrics/report.html",
    "metrics/memory.csv",
    "models/release/README.md",
    "models/release/SHA256SUMS",
}
CHAIN = 10
# Longer than anything here takes; what is not at its end by then is stuck.
PATIENCE = 300
# What dvc changes, with how many changes of it to choose among.
CHANGES = {"dvc.lock": 6, ".dvc/tmp/rwlock": 12, ".dvc/cache": 30, ".": 90}
SIZES = (0, 40, 300, 4096)
PREPARE = ("dvc", "repro", "prepare")
KILLED = str(Path(__file__).parent / "dvc_killed.py")


def results(folder: Path) -> dict[str, bytes]:
    outs = [out for paths in stages(folder).values() for out in paths if out not in TIMINGS]
    found = contents(folder, outs)
    return {name: found[name] for name in found.keys() - MADE_OF_TIMINGS}


class Run:
    """`make repro` in `folder`, or another command of dvc's, in a group of processes."""

    def __init__(self, folder: Path, *command: str):
        self.folder = folder
        self.environment = os.environ | {"CHECKPOINT_SECONDS": "0", "DVC_NO_ANALYTICS": "1"}
        mended = self._do(sys.executable, "-m", "tools.recover").communicate()[0]
        self.said, self.began = mended, time.monotonic()
        self.process = self._do(*(command or ("dvc", "repro")))

    def _do(self, *command: str) -> subprocess.Popen:
        # A pipe would fill up while nobody reads.
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def kill(self, group: bool) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL) if group else self.process.kill()

    def wait(self) -> int | None:
        """Its exit status; None when it did not come to its end, and was ended."""
        try:
            self.said += self.process.communicate(timeout=PATIENCE)[0]
            return self.process.returncode
        except subprocess.TimeoutExpired:
            self.kill(group=True)
            self.said += self.process.communicate()[0]
            return None


def running(folder: Path) -> dict[str, int]:
    """The stages of `folder` that run now, with their process numbers; of workers, the first."""
    found: dict[str, int] = {}
    for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            module = next((word.decode() for word in words if word.startswith(b"stages.")), None)
            if module and (process / "cwd").resolve() == folder.resolve():
                found.setdefault(module.removeprefix("stages."), int(process.name))
    return found


def chain(
    fresh: Path, folder: Path, count: int, kill: Callable[[Path], Kill], *command: str
) -> Iterator[Kill]:
    """Yield `count` kills that count, up to ten to a copy of `fresh`, and others on the way.

    kill(folder) starts a run, disturbs it and says what it did; where the run came to its end
    before, another copy is taken. `command`, by default dvc repro, has to come to its end at last.
    """
    copy_of(fresh, folder)
    undisturbed = Run(folder, *command)
    assert undisturbed.wait() == 0, undisturbed.said
    whole = results(folder)
    while count > 0:
        copy_of(fresh, folder)
        made: list[Kill] = []
        while len(made) < min(CHAIN, count) and all(each.counted for each in made):
            made.append(kill(folder))
            # A stage that outlives dvc has to end by itself.
            while running(folder):
                time.sleep(0.01)
        end = Run(folder, *command)
        made[-1].stuck |= end.wait() != 0
        made[-1].traceback |= "Traceback" in end.said
        if made[-1].stuck or made[-1].traceback:
            print(end.said, flush=True)
        identical = results(folder) == whole
        for each in made:
            each.identical = identical
        yield from made
        count -= max(1, sum(each.counted for each in made))


def copy_of(fresh: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(fresh, folder, symlinks=True)


def at_a_moment(folder: Path, draw: random.Random) -> Kill:
    """Kill the stage that runs, dvc, or both."""
    whom = draw.choice(["the stage", "dvc alone", "dvc and the stage"])
    run = Run(folder)
    while not running(folder) and run.process.poll() is None:
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 3))
    now, alive = running(folder), run.process.poll() is None
    if whom == "the stage":
        for number in now.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
    else:
        run.kill(group=whom != "dvc alone")
    status = run.wait()
    counted = alive and status != 0 and (bool(now) or whom != "the stage")
    kill = Kill(f"dvc repro: {next(iter(now), 'between stages')}", f"{whom}, at a moment", counted)
    # That it ended by itself, in spite of a fault, is not of this kill.
    kill.stuck = status is None or (not counted and status != 0)
    kill.traceback = "Traceback" in run.said
    return kill


def while_dvc_writes(folder: Path, draw: random.Random) -> Kill:
    """Have dvc die at a change of a file: before it, when it is empty, or half-written."""
    path = draw.choice(list(CHANGES))
    change, size = draw.randint(1, CHANGES[path]), draw.choice(SIZES)
    run = Run(folder, sys.executable, KILLED, path, str(change), str(size), "repro")
    status = run.wait()
    said = [line for line in run.said.splitlines() if line.startswith("killed: ")]
    killed = status == -signal.SIGKILL and bool(said)
    kill = Kill("dvc writes", said[0].removeprefix("killed: ") if said else "not reached", killed)
    kill.stuck, kill.traceback = not killed and status != 0, "Traceback" in run.said
    if kill.stuck:
        print(run.said, flush=True)
    return kill


def of_a_worker(folder: Path, draw: random.Random) -> Kill:
    """Kill one of the processes that prepare shares its work among; it must end by itself."""
    run = Run(folder, *PREPARE)
    workers: list[str] = []
    # Before them it has others, one at a time.
    at_once = min(2, len(os.sched_getaffinity(0)))
    while len(workers) < at_once and run.process.poll() is None:
        if stage := running(folder).get("prepare"):
            with contextlib.suppress(OSError):
                workers = Path(f"/proc/{stage}/task/{stage}/children").read_text().split()
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.3))
    number = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
    with contextlib.suppress(ProcessLookupError, IndexError):
        os.kill(int(draw.choice(workers)), number)
    began = time.monotonic()
    status = run.wait()
    counted = status != 0 and "prepare: a worker process died" in run.said
    kill = Kill("dvc repro: a worker of prepare", signal.Signals(number).name, counted)
    kill.stuck = time.monotonic() - began > 30 or (status != 0 and not counted)
    kill.traceback = "Traceback" in run.said
    return kill


def of_the_queue(folder: Path, draw: random.Random) -> Kill:
    """Kill what works on the queue, or a part of it, and queue the same experiment again."""
    start_queue(folder)
    time.sleep(draw.uniform(1, 8))
    alive = queue_processes(folder)
    for number in draw.sample(alive, draw.randint(1, len(alive)) if alive else 0):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    succeeded = successes(folder)
    start_queue(folder)
    deadline = time.monotonic() + PATIENCE
    while successes(folder) <= succeeded and time.monotonic() < deadline:
        time.sleep(0.5)
    kill = Kill("dvc queue", f"{len(alive)} processes or some, at a moment", bool(alive))
    kill.stuck = time.monotonic() >= deadline
    # The worker waits for more for a while.
    for number in queue_processes(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    return kill


def start_queue(folder: Path) -> None:
    queued = Run(folder, "dvc", "exp", "run", "--queue", "-q", "-f", "-n", "again")
    assert queued.wait() == 0, queued.said
    # It goes into the background, and would keep a pipe open.
    start = ["dvc", "queue", "start", "-q"]
    subprocess.run(start, cwd=folder, stdout=subprocess.DEVNULL, check=False)


def successes(folder: Path) -> int:
    shown = Run(folder, "dvc", "queue", "status")
    shown.wait()
    return shown.said.count("Success")


def queue_processes(folder: Path) -> list[int]:
    """Processes of dvc's that work on the queue of `folder`, its stages with them."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes()
            inside = (process / "cwd").resolve().is_relative_to(folder.resolve())
            if inside and (b"dvc" in words or b"stages." in words):
                found.append(int(process.name))
    return sorted(found)


def parts(folder: Path, seed: int) -> dict[str, Iterator[Kill]]:
    """The chains by the name of their part of `make chaos`; they begin when they are asked."""
    os.environ |= {"STUB_LOG": str(folder / "stubs.log"), "STUB_GUARDED": "1"}
    counts = {"dvc": 60, "workers": 20, "writes": 120, "queue": 10}
    kinds = {
        "dvc": (at_a_moment, lambda: make_workspace(folder / "tiny", git=True)),
        "workers": (of_a_worker, lambda: many_rows(folder / "rows")),
        "writes": (while_dvc_writes, lambda: stubs.make(folder / "stubs")),
        "queue": (of_the_queue, lambda: stubs.make(folder / "queued")),
    }

    def kills(name: str) -> Iterator[Kill]:
        kind, make = kinds[name]
        draw, command = random.Random(f"{seed} {name}"), PREPARE if name == "workers" else ()
        yield from chain(make(), folder / name, counts[name], lambda at: kind(at, draw), *command)

    return {name: kills(name) for name in kinds}


def many_rows(folder: Path) -> Path:
    """So many that prepare shares its work among processes."""
    make_workspace(folder, git=True, prepare={"train_rows": None})
    make_rows(folder / "data/source/rows.jsonl", 6_000)
    return folder
