"""Checkpoints of a training run: outside DVC's outs, keyed by everything that decides the result.

A killed run resumes from its newest complete checkpoint and ends with the bytes of an undisturbed
one. Checkpoints of other parameters, data, base, code or library versions have another key and are
ignored. The folder is removed when the outputs are in place.
"""

import hashlib
import json
import os
import shutil
import signal
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from transformers import TrainerCallback

from stages.shared.interrupts import (
    ONE_PRESS_SECONDS,
    SIGNALS,
    kill_oneself,
    note_interrupt,
)
from stages.shared.outputs import SUMS, check_space, check_sums, sync_folder, write_sums
from stages.shared.process import StageError, check_inputs, lock, sha256
from stages.shared.provenance import version_of
from stages.shared.ranks import ALONE, World
from stages.training.paged import page_again

KEPT = 2
# A kill loses at most this much work. The variable is for tests.
SECONDS = float(os.environ.get("CHECKPOINT_SECONDS", "600"))
LIBRARIES = (
    *("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes"),
    # Whether these are installed decides how a GPU rounds.
    *("liger-kernel", "flash-attn-4"),
)


def fingerprint(params: dict, inputs: list[Path], code: list[Path], device: str) -> str:
    """Key of a run: its parameters, inputs by their SHA256SUMS, code, libraries and device kind.

    By content, not by path, so that a run can resume in a copy of the project.
    """
    facts = {
        "params": params,
        "inputs": [sha256(folder / SUMS) for folder in inputs],
        "code": [sha256(file) for file in code],
        "libraries": [version_of(name) for name in LIBRARIES],
        "device": device,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def folder_of(key: str) -> Path:
    return Path(os.environ.get("DVC_ROOT", ".")) / "checkpoints" / key


def same_checkpoint(folder: Path, world: World) -> Path | None:
    """The checkpoint from which all ranks resume: rank 0's newest, sent to machines without it."""
    newest = newest_complete(folder, world.size) if world.first else None
    if world.size == 1 or not world.same(newest is not None):
        return newest
    checkpoint = folder / world.same(newest.name if newest else "")
    sums = checkpoint / SUMS
    seal = world.same(sums.read_bytes() if world.first else b"")
    lacks = not sums.exists() or sums.read_bytes() != seal
    if any(world.gather(lacks)):
        names = [p.name for p in checkpoint.iterdir()] if world.first else []
        for name in world.same(sorted(names)):
            content = world.same((checkpoint / name).read_bytes() if world.first else b"")
            if lacks:
                checkpoint.mkdir(parents=True, exist_ok=True)
                # Other ranks of this machine write the same.
                partial = checkpoint / f".{name}.{world.rank}"
                partial.write_bytes(content)
                partial.replace(checkpoint / name)
    world.wait()
    return checkpoint


@contextmanager
def checkpoint_folder(key: str):
    """Yield the folder of run `key`, locked against a second run; remove it on success.

    It is in DVC's root project, even for experiments in a temporary copy.
    """
    folder = folder_of(key)
    root = folder.parent
    with lock(folder / "lock", "train"):
        others = [other for other in root.iterdir() if other != folder and any(_numbered(other))]
        if others:
            size = sum(map(_bytes_of, others))
            print(
                f"train: {len(others)} unfinished runs with other parameters take "
                f"{size / 1e9:.2f} GB in {root}; delete those that you will not resume",
                flush=True,
            )
        yield folder
        shutil.rmtree(folder)


def _bytes_of(folder: Path) -> int:
    """Bytes of the files in `folder`, whose run may be going on and remove some meanwhile."""
    found = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                found += (Path(parent) / name).stat().st_size
    return found


def newest_complete(folder: Path, ranks: int = 1) -> Path | None:
    """The newest intact checkpoint, to resume from; damaged ones are removed.

    It may come from a different number of ranks, since every step has the same rows.
    """
    for checkpoint in reversed(_numbered(folder)):
        try:
            check_sums(checkpoint, "train")
        except StageError:
            print(f"train: {checkpoint.name} is incomplete or damaged, skipped", flush=True)
            shutil.rmtree(checkpoint)
        else:
            made = len(list(checkpoint.glob("rng_state*.pth")))
            other = f", written by {made} ranks, not {ranks}: rounding may differ"
            print(
                f"train: resuming from {checkpoint.name}{other if made != ranks else ''}",
                flush=True,
            )
            return checkpoint
    return None


def _numbered(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


class Checkpoints(TrainerCallback):
    """Saves every SECONDS and on SIGTERM, SIGINT or SIGHUP, and adds checksums.

    A signal only sets a flag: it often arrives twice, and the current step must end first. During
    the last step or later, the stage finishes writing, and the next stage does not start. A second
    Ctrl-C ends the stage at once. Ranks agree at every step: the clock of the first and the signal
    of any count for all.
    """

    def __init__(self, folder: Path, world: World = ALONE):
        self.folder = folder
        self.world = world
        self.stopped_by: int | None = None
        self.signaled_at: float | None = None
        self.trained = False

    def check_space(self, trainable: int, best: bool) -> None:
        """Raise StageError if the disk lacks room for the adapter and its checkpoints.

        best: whether each checkpoint includes the best state
        """
        # Float32 values, with two moments each in a checkpoint.
        size = trainable * (4 + (12 + 4 * best) * (KEPT + 1))
        check_space(self.folder, size, "the adapter with its checkpoints")

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        page_again(optimizer)
        self.saved_at = time.monotonic()
        for number in SIGNALS:
            # nohup and a script's `&` ignore signals on purpose.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._stop)

    def _stop(self, number, frame):
        now = time.monotonic()
        first = self.signaled_at is None
        self.signaled_at = self.signaled_at or now
        if number == signal.SIGINT and now - self.signaled_at > ONE_PRESS_SECONDS:
            kill_oneself(number)
        if self.trained:
            note_interrupt()
        else:
            self.stopped_by = number
        if number == signal.SIGINT and first:
            what = b"its outputs are" if self.trained else b"this step is"
            # print() is not reentrant, and this handler may have interrupted one.
            os.write(2, b"train: stops when " + what + b" complete; Ctrl-C again ends it now\n")

    def on_step_end(self, args, state, control, **kwargs):
        # Before the save is due, only an early stop ends training.
        if state.global_step == state.max_steps or control.should_training_stop:
            self.trained = True
            if self.stopped_by:
                self.stopped_by = None
                note_interrupt()
            return
        due = time.monotonic() - self.saved_at >= SECONDS
        said = self.world.gather((due, self.stopped_by))
        agreed = next((signal for _, signal in said if signal), None)
        # A signal that arrives now waits for the next step.
        self.stopped_by = agreed or self.stopped_by
        if agreed or said[0][0]:
            control.should_save = True
            control.should_training_stop = bool(agreed)

    def on_save(self, args, state, control, **kwargs):
        checkpoint = self.folder / f"checkpoint-{state.global_step}"
        # Each rank writes its random states on its own machine.
        own = checkpoint / f"rng_state_{self.world.rank}.pth"
        states = self.world.gather((own.name, own.read_bytes() if own.exists() else b""))
        self.saved_at = time.monotonic()
        if self.world.first:
            for name, content in states:
                if content and not (checkpoint / name).exists():
                    (checkpoint / name).write_bytes(content)
            write_sums(checkpoint)
            sync_folder(checkpoint)
            for old in _numbered(self.folder)[:-KEPT]:
                shutil.rmtree(old)
        if not self.stopped_by:
            try:
                check_inputs()
            except StageError as error:
                print(f"train: the result will be refused: {error}", flush=True)

    def raise_if_stopped(self) -> None:
        """After training: end the stage if a signal stopped training early."""
        if self.stopped_by:
            name = signal.Signals(self.stopped_by).name
            raise StageError(f"stopped by {name}; dvc repro resumes from the saved checkpoint")
