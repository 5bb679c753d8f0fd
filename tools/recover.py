"""Repair files of DVC that a kill left empty or truncated.

    python -m tools.recover

DVC writes .dvc/tmp/rwlock and dvc.lock in place. A broken rwlock is removed, and so are its
entries for processes that are gone. A broken dvc.lock is replaced by Git's; `dvc repro` takes later
results from its run cache. Does nothing if nothing is broken or while another `dvc` is writing.
`make repro` starts with it.
"""

import fcntl
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from ruamel.yaml import YAML, YAMLError

TMP = Path(".dvc/tmp")
RWLOCK, DVC_LOCK, DVC_YAML = TMP / "rwlock", Path("dvc.lock"), Path("dvc.yaml")
# What reading another structure than DVC's raises. A UnicodeDecodeError is a ValueError.
DAMAGED = (
    YAMLError,
    TypeError,
    KeyError,
    AttributeError,
    ValueError,
    RecursionError,
    StopIteration,
)
HASH = re.compile(r"[0-9a-f]{32}(\.dir)?")


@contextmanager
def held(path: Path):
    """Yield whether we hold the lock `path`, which DVC takes before it writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True
        except BlockingIOError:
            yield False


def recover_rwlock() -> None:
    """Remove all entries from DVC's list of busy paths but those of a running `dvc`."""
    if not RWLOCK.exists():
        return
    try:
        before = json.loads(RWLOCK.read_text(encoding="utf-8"))
        writers, readers = before.get("write", {}), before.get("read", {})
        alive = {"write": {path: by for path, by in writers.items() if lives(by)}}
        reading = {path: [by for by in all_ if lives(by)] for path, all_ in readers.items()}
        alive["read"] = {path: all_ for path, all_ in reading.items() if all_}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        print(f"recover: {RWLOCK} was broken, removed", flush=True)
        RWLOCK.unlink()
        return
    if alive != {"write": writers, "read": readers}:
        print(f"recover: {RWLOCK} named processes that are gone; removed those entries", flush=True)
        replace(RWLOCK, json.dumps(alive).encode())


def lives(holder: dict) -> bool:
    """Whether process `pid` still runs the command `cmd` (its sys.argv) that DVC recorded.

    The PID alone is not enough, since PIDs are reused, in containers soon.
    """
    try:
        words = Path(f"/proc/{int(holder['pid'])}/cmdline").read_bytes().split(b"\0")[:-1]
    except OSError:
        return False
    arguments = holder["cmd"].partition(" ")[2]
    return os.fsdecode(b" ".join(words)).endswith(arguments)


def recover_dvc_lock() -> None:
    """Replace a broken dvc.lock by Git's, or remove it if Git has none."""
    if not DVC_LOCK.exists():
        return
    if not DVC_LOCK.is_file():
        sys.exit("recover: dvc.lock is not a file; remove it: git checkout dvc.lock")
    content, kept, stages = DVC_LOCK.read_bytes(), in_git(), declared_outs()
    if b"\n<<<<<<< " in content:
        sys.exit(
            "recover: dvc.lock has a merge conflict; take one side, and dvc repro does the rest: "
            "git checkout --theirs dvc.lock"
        )
    if not (why := broken(content, kept, stages)):
        return
    aside = TMP / "dvc.lock.broken"
    os.replace(DVC_LOCK, aside)
    done = f"moved to {aside}"
    if kept is not None and not broken(kept, None, stages):
        replace(DVC_LOCK, kept)
        done += ", Git's is in its place"
    print(f"recover: dvc.lock {why}; {done}; dvc repro restores later results from its cache")


def declared_outs() -> dict[str, set[str]]:
    """Stage -> outputs in dvc.yaml. Exits if it cannot be read, since a lock is then no use."""
    try:
        stages = YAML(typ="safe").load(DVC_YAML)["stages"]
        return {
            name: {
                out if isinstance(out, str) else next(iter(out))
                for kind in ("outs", "metrics", "plots")
                for out in stage.get(kind, [])
            }
            for name, stage in stages.items()
        }
    except DAMAGED:
        sys.exit("recover: dvc.yaml cannot be read; mend it first: git diff dvc.yaml")


def broken(content: bytes, kept: bytes | None, stages: dict[str, set[str]]) -> str | None:
    """What is wrong with a dvc.lock that may be truncated anywhere; None if nothing is.

    kept    Git's version, whose stages and outputs must be present as far as dvc.yaml has them
    stages  those of dvc.yaml with their outputs
    """
    if not content.strip():
        return "is empty"
    if not content.endswith(b"\n"):
        return "is cut off"
    try:
        recorded = outs_of(content)
        before = outs_of(kept) if kept else {}
    except DAMAGED:
        return "is broken"
    for name in before.keys() & stages.keys():
        if name not in recorded or (before[name] & stages[name]) - recorded[name]:
            return f"is cut off before the end of {name}"
    return None


def outs_of(content: bytes) -> dict[str, set[str]]:
    """Stage -> outputs that a dvc.lock records. Raises ValueError for an incomplete hash."""
    stages = YAML(typ="safe").load(content.decode())["stages"]
    for stage in stages.values():
        for entry in stage.get("deps", []) + stage.get("outs", []):
            if "md5" in entry and not HASH.fullmatch(entry["md5"]):
                raise ValueError(entry["path"])
    return {name: {out["path"] for out in stage.get("outs", [])} for name, stage in stages.items()}


def in_git() -> bytes | None:
    """dvc.lock as it was last added or committed."""
    found = subprocess.run(["git", "show", ":./dvc.lock"], capture_output=True, check=False)
    return found.stdout if found.returncode == 0 else None


def replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def main() -> None:
    if not DVC_YAML.exists():
        sys.exit("recover: dvc.yaml: not found; run it in the project's folder")
    with held(TMP / "lock") as ours, held(TMP / "rwlock.lock") as guarded:
        if ours and guarded:
            recover_rwlock()
            recover_dvc_lock()


if __name__ == "__main__":
    main()
