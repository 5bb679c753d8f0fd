"""Kill real stages in the middle, run them again, and compare with what was never disturbed.

A kill is SIGKILL, at a change of a file (chosen) or at a moment (random). It counts only if the
stage was alive and its outputs were not all there. What it left behind stays in place for the
run after it, as it would on a user's disk.
"""

import random
import shutil
import signal
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import quick
import yaml

# Metrics of time and memory, which no two runs share.
TIMINGS = {f"metrics/{name}_cost.json" for name in ("quantize", "train", "eval", "merge")}
# train saves at every step, so that a kill comes between, before and during checkpoints.
ENV = {"CHECKPOINT_SECONDS": "0"}


@dataclass
class Kill:
    """One kill and what came of it."""

    stage: str
    # "before change 12 (os.rename models/.adapter.partial)" or "after 0.431 s"
    instant: str
    counted: bool
    identical: bool = False
    # A run after it failed, or did not come to its end.
    stuck: bool = False
    # Something printed one.
    traceback: bool = False


def stages(folder: Path) -> dict[str, list[str]]:
    """Every stage with the paths of its outputs, metrics and plots."""
    pipeline = yaml.safe_load((folder / "dvc.yaml").read_text())["stages"]
    return {
        name: [
            out if isinstance(out, str) else next(iter(out))
            for kind in ("outs", "metrics", "plots")
            for out in stage.get(kind, [])
        ]
        for name, stage in pipeline.items()
    }


def contents(folder: Path, outs: list[str]) -> dict[str, bytes]:
    """Every file of `outs` but timings, by its path."""
    found = {}
    for out in outs:
        path = folder / out
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and out not in TIMINGS:
                found[file.relative_to(folder).as_posix()] = file.read_bytes()
    return found


def before(finished: Path, name: str, folder: Path) -> Path:
    """A copy of `finished` in which `name` has yet to run, its outputs removed as by DVC."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("*.log", "checkpoints"))
    for out in stages(folder)[name]:
        path = folder / out
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return folder


class Target:
    """One stage of a finished tiny pipeline, to be killed again and again."""

    def __init__(self, finished: Path, name: str, folder: Path):
        self.finished, self.name, self.folder = finished, name, folder
        self.outs = stages(finished)[name]
        self.whole = contents(finished, self.outs)

    @cached_property
    def seconds(self) -> float:
        """What the stage takes undisturbed."""
        started = time.monotonic()
        quick.run(self.name, before(self.finished, self.name, self.folder), **ENV)
        return time.monotonic() - started

    @cached_property
    def changes(self) -> list[str]:
        """The changes of files of a run to its end."""
        return quick.changes(self.name, before(self.finished, self.name, self.folder), **ENV)

    def chosen(self, count: int) -> list[int]:
        """`count` changes of files to kill at: around every rename, and spread over the rest."""
        total = len(self.changes)
        renames = [i for i, line in enumerate(self.changes, 1) if line.startswith("os.rename")]
        wanted = [i for at in renames for i in (at, at + 1) if i <= total]
        wanted += [1 + round(i * (total - 1) / max(1, count - 1)) for i in range(count)]
        return list(dict.fromkeys(wanted))[:count]

    def kill_at(self, change: int) -> Kill:
        before(self.finished, self.name, self.folder)
        stage = quick.Stage(self.name, self.folder, kill_at=change, **ENV)
        return self._finish(stage, f"before change {change} ({self.changes[change - 1]})")

    def kill_after(self, seconds: float) -> Kill:
        before(self.finished, self.name, self.folder)
        stage = quick.Stage(self.name, self.folder, **ENV)
        stage.process.join(seconds)
        stage.kill(signal.SIGKILL)
        return self._finish(stage, f"after {seconds:.3f} s")

    def _finish(self, stage: quick.Stage, instant: str) -> Kill:
        killed = stage.wait() == -signal.SIGKILL
        there = all((self.folder / out).exists() for out in self.outs)
        counted = killed and not (there and contents(self.folder, self.outs) == self.whole)
        again = quick.Stage(self.name, self.folder, **ENV)
        identical = again.wait() == 0 and contents(self.folder, self.outs) == self.whole
        return Kill(self.name, instant, counted, identical and not self._left_over())

    def _left_over(self) -> list[Path]:
        """Partial folders and checkpoints that a finished stage should have removed."""
        parents = {(self.folder / out).parent for out in self.outs}
        found = [path for parent in parents for path in parent.glob(".*partial*")]
        return found + list(self.folder.glob("checkpoints/*"))


def rounds(finished: Path, folder: Path, chosen: int, at_random: int, seed: int):
    """Kill every stage so often; yields each Kill. Random ones that do not count are repeated."""
    draw = random.Random(seed)
    for name in stages(finished):
        target = Target(finished, name, folder)
        for change in target.chosen(chosen):
            yield target.kill_at(change)
        left = at_random
        while left:
            kill = target.kill_after(draw.uniform(0.02, 0.9 * target.seconds))
            left -= kill.counted
            yield kill
