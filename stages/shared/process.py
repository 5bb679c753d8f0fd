"""Common behaviour of stages: they notice changed inputs, end with dvc and fail in one line.

DVC records parameters and code as they are after a command ends. A stage that was started with
others would be recorded wrongly, so before writing `stages/shared/outputs.py` compares the stage's
inputs with those at its start.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from stages.shared.interrupts import (
    end_with_parent,
    hear_interrupts,
    interrupted_before,
    process_ticks,
)

# YAMLError too, since params is where a Python without the packages is noticed.
from stages.shared.params import PARAMS, YAMLError, keep_params, load_params, read_yaml, value_at
from stages.shared.screen import on_screen

# Errors of the disk -> remedy.
DISK_FAULTS = {
    errno.ENOSPC: "make room and run it again",
    errno.EDQUOT: "make room and run it again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) and run it again",
    errno.EACCES: "fix its permissions (chown, chmod) and run it again",
    errno.EPERM: "fix its permissions (chown, chmod) and run it again",
    errno.EROFS: "make it writable and run it again",
}
_begun: dict = {}


class StageError(Exception):
    """A fault the user can fix. Its message is one line: what is wrong, where, what to do."""


def begin(name: str) -> None:
    """Start stage `name` of dvc.yaml. Call it before the slow imports.

    Checks params.yaml, records the stage's inputs, turns errors into one line, and ties this
    process to its parent: a stage must not outlive `dvc`, keep the GPU and write outputs later.
    """
    load_params()
    sys.excepthook = lambda kind, error, trace: _report(name, kind, error, trace)
    hear_interrupts()
    if sys.argv[1:]:
        raise StageError(f"takes no arguments, but was given {sys.argv[1]}; change params.yaml")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As stderr does: file names may be undecodable, or not encodable by the terminal.
        sys.stdout.reconfigure(errors="backslashreplace")
    quiet_libraries()
    _end_with_dvc()
    _check_dvc()
    entry = _entry(name)
    _check_writable(entry)
    _begun["lock"] = lock(Path(".dvc/tmp") / f"{name}.lock", name)
    _begun.update(name=name, inputs=_inputs(name))
    keep_params()
    # The start time is accurate to 10 ms, sooner than Python reads any module.
    started = _process_start() + 0.02
    for path in _begun["inputs"]:
        # A time in the future means that the clock was set back.
        if path.endswith(".py") and started < os.stat(path).st_mtime <= time.time():
            raise StageError(f"{path} was edited while this stage started; run it again")


def quiet_libraries() -> None:
    """Configure libraries before they are imported, and silence them."""
    for variable, value in {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "BITSANDBYTES_NOWELCOME": "1",
        # Growing segments keep reserved memory close to allocated memory, as plan assumes.
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }.items():
        os.environ.setdefault(variable, value)
    if not sys.stderr.isatty():
        # In a log each step of a progress bar would be a line.
        os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    # Their warnings are for us as the caller, not for the user.
    warnings.simplefilter("ignore")
    for library in ("bitsandbytes", "liger_kernel"):
        logging.getLogger(library).setLevel(logging.ERROR)


def lock(path: Path, name: str) -> IO[str]:
    """Lock `path` for this process; if another process has the lock, print which and wait.

    Closing the file, or the end of the process, releases it.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            print(
                f"{name}: waiting for process {file.read()}, which runs the same stage", flush=True
            )
            fcntl.flock(file, fcntl.LOCK_EX)
        # The other process may have removed the file, and a third may have locked a new one.
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            return file
        file.close()


def check_inputs() -> None:
    """Raise StageError if the stage's parameters, code or input files changed since `begin`."""
    if "inputs" not in _begun:
        return
    before = _begun["inputs"]
    try:
        now = _inputs(_begun["name"])
    except (OSError, YAMLError, ValueError, TypeError, KeyError) as error:
        raise StageError(
            "an input changed while the stage ran, so its result is not recorded; "
            f"run it again ({str(error).splitlines()[0]})"
        ) from None
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        raise StageError(
            f"{', '.join(changed)} changed while the stage ran, so its result is not recorded; "
            "run it again"
        )


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def note_writing(path: Path) -> None:
    """Remember the file being written, for disk errors that do not name it."""
    _begun["writing"] = path


def code_files(name: str) -> list[Path]:
    """The Python files that stage `name` depends on, as dvc.yaml lists them."""
    return [Path(dep) for dep in _entry(name)["deps"] if dep.endswith(".py")]


def recorded() -> str:
    """dvc.lock, with which another machine can pull this one's results; "" if missing."""
    path = Path("dvc.lock")
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _entry(name: str) -> dict:
    return read_yaml(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"][name]


def _outs(entry: dict, *kinds: str) -> list[str]:
    """Paths of the outputs of `kinds` in dvc.yaml, with or without options."""
    outs = [out for kind in kinds for out in entry.get(kind, [])]
    return [out if isinstance(out, str) else next(iter(out)) for out in outs]


def _inputs(name: str) -> dict:
    """The stage's entry in dvc.yaml, its parameters by value and its files by content."""
    entry = _entry(name)
    params = read_yaml(PARAMS.read_text(encoding="utf-8"))
    inputs: dict[str, Any] = {f"dvc.yaml: {name}": entry}
    for key in entry.get("params", []):
        inputs[f"params.yaml: {key}"] = value_at(params, key)
    for dep in entry["deps"]:
        path = Path(dep)
        if path.suffix in (".py", ".json", ".ok"):
            inputs[dep] = sha256(path) if path.exists() else None
        else:
            # Weights are hashed by the stage that reads them; here size and time suffice.
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            inputs[dep] = [
                (str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()
            ]
    return inputs


def _check_writable(entry: dict) -> None:
    """Raise OSError or StageError now if the outputs cannot be written, not after hours."""
    for path in map(Path, _outs(entry, "outs", "metrics", "plots")):
        target = path.parent.resolve()
        if not target.is_relative_to(Path.cwd()):
            # DVC refuses it too, but after the stage has run.
            raise StageError(
                f"{path.parent} leads to {target}, outside the project, where DVC keeps no "
                "outputs; put the whole project on that disk, or the cache alone: "
                "dvc cache dir --local DIRECTORY"
            )
        for folder in (path, path.parent):
            if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
                # A read-only disk refuses its owner too.
                writable = os.statvfs(folder).f_flag & os.ST_RDONLY == 0
                number = errno.EACCES if writable else errno.EROFS
                raise OSError(number, os.strerror(number), str(folder))


def _end_with_dvc() -> None:
    end_with_parent(signal.SIGTERM)
    # dvc starts a stage in its own process group; a process that adopts orphans is in another.
    try:
        orphan = os.getpgid(os.getppid()) != os.getpgrp()
    except ProcessLookupError:
        orphan = True
    if orphan and "DVC_STAGE" in os.environ:
        raise StageError("dvc ended before the stage started")


def _check_dvc() -> None:
    """Raise StageError if DVC could not record this stage, or was told to stop."""
    if "DVC_STAGE" not in os.environ:
        return
    if interrupted_before():
        raise StageError(
            "interrupted at the end of the previous stage; dvc repro continues from here"
        )
    if set("{}") & set(os.getcwd()):
        raise StageError(
            f"{os.getcwd()}: DVC cannot keep files below a path with braces; move the project"
        )
    lock = Path("dvc.lock")
    # A truncated hash would make DVC rerun existing results.
    if lock.exists() and not lock.read_bytes().endswith(b"\n"):
        raise StageError("dvc.lock is truncated; fix it with: python -m tools.recover")


def _process_start() -> float:
    """Seconds since the epoch when this process started, to 10 ms."""
    started = process_ticks(os.getpid()) / os.sysconf("SC_CLK_TCK")
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - started
    return time.time() - age


def _disk_fault(error: BaseException) -> str | None:
    """One line for an error of the disk; libraries in Rust and C++ do not raise OSError."""
    text = str(error)
    for number, remedy in DISK_FAULTS.items():
        if getattr(error, "errno", None) == number or os.strerror(number) in text:
            where = getattr(error, "filename2", None) or getattr(error, "filename", None)
            return f"{where or _begun.get('writing', '.')}: {os.strerror(number)}; {remedy}"
    # torch.save does not report the reason.
    if "inline_container.cc" in text:
        return f"{_begun.get('writing', '.')}: cannot be written; is the disk full?"
    return None


def _report(
    name: str, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    message = fault_line(name, error)
    if message is None:
        for line in "".join(traceback.format_exception(kind, error, trace)).splitlines():
            print(on_screen(line), file=sys.stderr)
        return
    # The message may contain untrusted text.
    print(on_screen(f"{name}: {message}"), file=sys.stderr)
    # An error while preparing the advice must not hide the message.
    with contextlib.suppress(Exception):
        # DVC removed the outputs before it started the stage.
        if "DVC_STAGE" in os.environ and "DVC_EXP_NAME" not in os.environ and _in_cache(name):
            print(
                f"{name}: restore the earlier outputs with: git checkout params.yaml dvc.lock "
                "metrics && dvc checkout",
                file=sys.stderr,
            )


def fault_line(name: str, error: BaseException) -> str | None:
    """The error of stage `name` in one line; None for a bug, which needs a traceback."""
    kind = type(error)
    if issubclass(kind, KeyboardInterrupt):
        return "interrupted"
    if issubclass(kind, StageError):
        return str(error)
    if fault := _disk_fault(error):
        return fault
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("stages"):
        return (
            f"{sys.executable} has no module {error.name}; activate the project's environment "
            "first: . .venv/bin/activate"
        )
    if kind.__name__ == "OutOfMemoryError":
        return (
            "out of GPU memory; see with nvidia-smi what else uses it, or run this stage on the "
            f"CPU: CUDA_VISIBLE_DEVICES= dvc repro {name}"
        )
    if issubclass(kind, MemoryError) or "can't allocate memory" in str(error):
        return "out of memory (RAM); close other programs or use a smaller model or batch"
    return None


def _in_cache(name: str) -> bool:
    """Whether DVC's cache has the outputs in dvc.lock; in a fresh clone it does not."""
    lock = Path("dvc.lock")
    stages = read_yaml(lock.read_text(encoding="utf-8"))["stages"] if lock.exists() else {}
    md5s = {out["path"]: out["md5"] for out in stages.get(name, {}).get("outs", [])}
    found = subprocess.run(
        [sys.executable, "-m", "dvc", "cache", "dir"], capture_output=True, text=True, check=False
    )
    if found.returncode:
        return False
    cache = Path(found.stdout.strip()) / "files/md5"
    # Metrics and plots are in git and not cached.
    kept = [md5s[path] for path in _outs(_entry(name), "outs") if path in md5s]
    return bool(kept) and all((cache / md5[:2] / md5[2:]).exists() for md5 in kept)
