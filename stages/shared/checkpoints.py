"""Checkpoints of a training run: outside DVC's outs, keyed by what decides the result.

A killed run continues from its newest complete checkpoint and ends with the bytes of an
undisturbed one. A checkpoint made with other parameters, data, base, code or library versions
has another key and is never seen. The folder is removed when the adapter is in place.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainerCallback

from stages.shared.stage import SUMS, StageError, check_inputs, check_sums, sha256, write_sums

KEPT = 2
# A kill costs at most this much work. The variable exists for tests that kill often.
SECONDS = float(os.environ.get("CHECKPOINT_SECONDS", "600"))
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")


def fingerprint(params: dict, inputs: list[Path], code: list[Path], device: str) -> str:
    """Key of a run: its parameters, inputs by their SHA256SUMS, code, libraries and device kind.

    By content and never by path, so that a run continues in a copy of the project too.
    """
    facts = {
        "params": params,
        "inputs": [sha256(folder / SUMS) for folder in inputs],
        "code": [sha256(file) for file in code],
        "libraries": [importlib.metadata.version(name) for name in LIBRARIES],
        "device": device,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def checkpoint_folder(key: str):
    """Yield the folder of run `key`, locked against a second run; remove it on success.

    It lies in the project that DVC calls its root, also for experiments run in a temporary copy.
    """
    folder = Path(os.environ.get("DVC_ROOT", ".")) / "checkpoints" / key
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip()
            raise StageError(
                f"{folder}: the same training already runs (process {owner}); wait for it"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield folder
        shutil.rmtree(folder)


def newest_complete(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all as they were written; says so of damaged ones."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: -int(p.name.split("-")[1]))
    for checkpoint in found:
        try:
            check_sums(checkpoint, "train")
        except StageError:
            print(f"train: {checkpoint.name} is incomplete or damaged, skipped")
        else:
            return checkpoint
    return None


class Checkpoints(TrainerCallback):
    """Saves every SECONDS and on SIGTERM, SIGINT or SIGHUP; seals each checkpoint with its sums.

    A signal only sets a flag: it usually comes twice, and the step at hand ends first.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.saved_at = time.monotonic()
        self.stopped_by: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._stop)

    def _stop(self, number, frame):
        self.stopped_by = number

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            return
        if self.stopped_by or time.monotonic() - self.saved_at >= SECONDS:
            control.should_save = True
            control.should_training_stop = bool(self.stopped_by)

    def on_save(self, args, state, control, **kwargs):
        write_sums(self.folder / f"checkpoint-{state.global_step}")
        self.saved_at = time.monotonic()
        for old in sorted(
            self.folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1])
        )[:-KEPT]:
            shutil.rmtree(old)
        if not self.stopped_by:
            try:
                check_inputs()
            except StageError as error:
                print(f"train: the result will be refused: {error}")

    def raise_if_stopped(self) -> None:
        """After training: end the stage when a signal, and not the last step, ended it."""
        if self.stopped_by:
            name = signal.Signals(self.stopped_by).name
            raise StageError(f"stopped by {name}; dvc repro goes on from the saved checkpoint")
