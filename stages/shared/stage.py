"""What every stage does alike: begin, notice changed inputs, write outputs whole, fail in one line.

DVC records parameters and code as they are after a command ends. A stage that was started with
other ones would be recorded under a false name, so outputs pass through `whole_folder` and
`write_text`, which compare the stage's inputs with those at its beginning first.
"""

import ctypes
import errno
import hashlib
import json
import logging
import os
import shutil
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import yaml

from stages.shared.params import PARAMS, load_params

SUMS = "SHA256SUMS"
_PR_SET_PDEATHSIG = 1
_begun: dict = {}


class StageError(Exception):
    """A fault the user can mend. Its message is one line: what is wrong, where, what to do."""


def begin(name: str) -> None:
    """Start stage `name` of dvc.yaml. Call it before the slow imports.

    Checks params.yaml, notes the stage's inputs, makes faults one line, and ties this process
    to its parent: a stage must not outlive `dvc`, keep the GPU and write outputs later.
    """
    load_params()
    sys.excepthook = lambda kind, error, trace: _report(name, kind, error, trace)
    for variable, value in {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "BITSANDBYTES_NOWELCOME": "1",
    }.items():
        os.environ.setdefault(variable, value)
    # Libraries warn their callers, and the caller is us: none of it is for the user to act on.
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    _begun.update(name=name, inputs=_inputs(name))
    # The process's start is known to a tick of 10 ms, and Python reads no module that soon.
    started = _process_start() + 0.02
    for path in _begun["inputs"]:
        if path.endswith(".py") and os.stat(path).st_mtime > started:
            raise StageError(f"{path} was edited while this stage started; run it again")


def check_inputs() -> None:
    """Raise StageError if the stage's parameters, code or input files changed since `begin`."""
    if not _begun:
        return
    before, now = _begun["inputs"], _inputs(_begun["name"])
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        raise StageError(
            f"{', '.join(changed)} changed while the stage ran, so its result is not recorded; "
            "run it again"
        )


@contextmanager
def whole_folder(path: Path, resume_key: str | None = None):
    """Yield an empty folder that becomes `path`, complete with SHA256SUMS, when the block ends.

    On an error nothing is left behind; with `resume_key` the unfinished folder stays and a later
    call with the same key is given it again, for downloads.
    """
    partial = path.with_name(f".{path.name}.partial" + (f"-{resume_key}" if resume_key else ""))
    for stale in path.parent.glob(f".{path.name}.partial*"):
        if not resume_key or stale != partial:
            shutil.rmtree(stale)
    partial.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        write_sums(partial)
        for file in partial.rglob("*"):
            # safetensors writes 0600, which a DVC cache shared by a group could not use.
            file.chmod(0o755 if file.is_dir() else 0o644)
        check_inputs()
    except BaseException:
        if not resume_key:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(path)
    os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    """Write `path` under a temporary name first: an open() of it could write into DVC's cache."""
    check_inputs()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_metrics(path: Path, metrics: dict) -> None:
    """Write flat metrics as JSON, floats with 6 significant digits so that diffs stay quiet."""
    rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in metrics.items()}
    write_text(path, json.dumps(rounded, indent=2, allow_nan=False) + "\n")


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS (the format of sha256sum) over every other file of `folder`."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / SUMS)
    lines = [f"{sha256(p)}  {p.relative_to(folder).as_posix()}\n" for p in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path, stage: str) -> None:
    """Compare the files of `folder`, the output of `stage`, with its SHA256SUMS.

    Raises StageError naming the first file that is missing or differs. A damaged file may come
    out of DVC's cache, which never looks at it again: only making it anew repairs it.
    """
    repair = f"repair it with: dvc repro --force --single-item {stage}"
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise StageError(f"{folder / SUMS} is missing; {repair}") from None
    for line in lines:
        expected, name = line.split("  ", 1)
        file = folder / name
        if not file.is_file():
            raise StageError(f"{file} is missing; {repair}")
        if sha256(file) != expected:
            raise StageError(f"{file} is damaged (its SHA-256 differs); {repair}")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_files(name: str) -> list[Path]:
    """The Python files that stage `name` depends on, as dvc.yaml lists them."""
    return [Path(dep) for dep in _entry(name)["deps"] if dep.endswith(".py")]


def _entry(name: str) -> dict:
    return yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"][name]


def _inputs(name: str) -> dict:
    """The stage's entry in dvc.yaml, its parameter sections by value and its files by content."""
    entry = _entry(name)
    params = yaml.safe_load(PARAMS.read_text(encoding="utf-8"))
    inputs = {f"dvc.yaml: {name}": entry}
    inputs |= {f"params.yaml: {key}": params.get(key) for key in entry.get("params", [])}
    for dep in entry.get("deps", []):
        path = Path(dep)
        if path.suffix in (".py", ".json", ".ok"):
            inputs[dep] = sha256(path) if path.exists() else None
        else:
            # Weights are hashed by the stage that reads them; here size and time are enough.
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            inputs[dep] = [
                (str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()
            ]
    return inputs


def _process_start() -> float:
    """Seconds since the epoch when this process started, to 10 ms (proc(5), field 22)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - age


def _report(name, kind, error, trace) -> None:
    if issubclass(kind, KeyboardInterrupt):
        message = "interrupted"
    elif issubclass(kind, StageError):
        message = str(error)
    elif issubclass(kind, OSError) and error.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
    ):
        message = f"{error.filename or 'write'}: {error.strerror}"
    elif issubclass(kind, ModuleNotFoundError) and not (error.name or "").startswith("stages"):
        message = (
            f"{sys.executable} has no module {error.name}; activate the project's environment "
            "first: . .venv/bin/activate"
        )
    elif issubclass(kind, MemoryError):
        message = "out of memory (RAM)"
    else:
        sys.__excepthook__(kind, error, trace)
        return
    print(f"{name}: {message}", file=sys.stderr)
