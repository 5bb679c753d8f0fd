"""Outputs that are complete or absent: folders with checksums, text, metrics, links to weights.

Stages write everything through `whole_folder` or `write_text`, so that no partial output has a
final name, and nothing is written after an input of the stage has changed.
"""

import json
import math
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from stages.shared.process import StageError, check_inputs, note_writing, sha256

SUMS = "SHA256SUMS"
GB = 1e9  # bytes
# sha256sum escapes these in a name, and puts a backslash before the line.
_ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n", "\r": "\\r"})


@contextmanager
def whole_folder(path: Path, resume_key: str | None = None, sums: dict[str, str] | None = None):
    """Yield an empty folder that becomes `path`, with SHA256SUMS, when the block ends.

    On an error it is removed; with `resume_key`, for downloads, it stays, and a later call with the
    same key gets it again. The block may put the SHA-256 of files that it hashed while writing into
    `sums`, by name, so that large files are not read again.
    """
    partial = path.with_name(f".{path.name}.partial" + (f"-{resume_key}" if resume_key else ""))
    note_writing(path)
    for stale in path.parent.glob(f".{path.name}.partial*"):
        if not resume_key or stale != partial:
            shutil.rmtree(stale)
    partial.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        write_sums(partial, sums)
        sync_folder(partial)
        check_inputs()
    except BaseException:
        if not resume_key:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    # The final name never refers to a partial folder.
    old = path.with_name(f".{path.name}.partial-old")
    if path.exists():
        os.rename(path, old)
    os.replace(partial, path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `path` under a temporary name first: an open() of it could write into DVC's cache."""
    check_inputs()
    note_writing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Sync `folder` and its files to disk, with the permissions of new files.

    A preempted machine loses unsynced bytes, even if the name exists.
    """
    umask = os.umask(0)
    os.umask(umask)
    for file in [*folder.rglob("*"), folder]:
        _sync(file)
        # safetensors writes 0600, which a DVC cache shared by a group could not use. A file with
        # a second link may be in DVC's cache, which must stay read-only.
        if file.is_file() and file.stat().st_nlink == 1:
            file.chmod(0o666 & ~umask)


def write_metrics(path: Path, metrics: dict) -> None:
    """Write flat metrics as JSON, floats with 6 significant digits so that diffs stay quiet.

    Raises StageError naming one that is not finite.
    """
    for key, value in metrics.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise StageError(
                f"{path}: {key} is {value}, so the model is broken; lower "
                "train.learning_rate, or name another model.id"
            )
    rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in metrics.items()}
    write_text(path, json.dumps(rounded, indent=2) + "\n")


def read_json(path: Path) -> dict:
    """The JSON object in a file of this pipeline. Raises StageError if somebody damaged it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise StageError(
            f"{path}: not a JSON object: it was edited or damaged, or has a merge conflict; run "
            "its stage again"
        )
    return content


def write_json(path: Path, content: dict, **options) -> None:
    """Write `content` as indented JSON into a folder of `whole_folder`; `options` of json.dumps."""
    path.write_text(json.dumps(content, indent=2, **options) + "\n", encoding="utf-8")


def link_or_copy(source: Path, target: Path) -> None:
    """Give `target` the bytes of `source` without a second copy on disk where links work.

    Links fail across file systems, on some network and FAT disks, and if the kernel forbids links
    to other users' files (EXDEV, EOPNOTSUPP, EPERM).
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        # Copying reports other problems of the disk.
        shutil.copyfile(source, target)


def write_sums(folder: Path, known: dict[str, str] | None = None) -> None:
    """Write SHA256SUMS (the format of sha256sum) over every other file of `folder`.

    known  name -> sum that need not be computed

    Raises StageError for a name that is not UTF-8.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / SUMS)
    lines = []
    for file in files:
        name = file.relative_to(folder).as_posix()
        if any("\udc80" <= character <= "\udcff" for character in name):
            raise StageError(f"{folder}: the name {name!a} is not UTF-8; rename the file")
        escaped = name.translate(_ESCAPES)
        mark = "\\" if escaped != name else ""
        lines.append(f"{mark}{(known or {}).get(name) or sha256(file)}  {escaped}\n")
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path, stage: str, weights: bool = True) -> None:
    """Compare the files of `folder`, the output of `stage`, with its SHA256SUMS.

    Without `weights` safetensors files must only exist: hashing them takes a second per GB. Raises
    StageError naming the first file that is missing or unexpected, else the first that differs. DVC
    never verifies its cache and would restore a damaged file from it, so tools/repair.py deletes it
    there first.
    """
    repair = f"repair it with: python -m tools.repair {stage}"
    listed = {}
    try:
        text = (folder / SUMS).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise StageError(f"{folder / SUMS} is missing; {repair}") from None
    except UnicodeDecodeError:
        raise StageError(f"{folder / SUMS} is damaged; {repair}") from None
    # Not splitlines(), which also splits at U+2028.
    for line in filter(None, text.split("\n")):
        if not (match := re.fullmatch(r"(\\?)([0-9a-f]{64})  (.+)", line)):
            raise StageError(f"{folder / SUMS} is damaged; {repair}")
        listed[_unescaped(match[3]) if match[1] else match[3]] = match[2]
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {SUMS}
    if odd := sorted(listed.keys() ^ found):
        what = f"is not in {folder / SUMS}" if odd[0] in found else "is missing"
        raise StageError(f"{folder / odd[0]} {what}; {repair}")
    files = [folder / name for name in sorted(found)]
    if not weights:
        files = [file for file in files if file.suffix != ".safetensors"]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for file, digest in zip(files, pool.map(sha256, files), strict=True):
            if digest != listed[file.relative_to(folder).as_posix()]:
                raise StageError(f"{file} is damaged (its SHA-256 differs); {repair}")


def _unescaped(name: str) -> str:
    plain = {escaped[1]: chr(code) for code, escaped in _ESCAPES.items()}
    return re.sub(r"\\(.)", lambda match: plain.get(match[1], match[0]), name)


def check_space(folder: Path, size: int, what: str) -> None:
    """Raise StageError if `size` bytes of `what` do not fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise StageError(
            f"{folder}: {what} takes {size / GB:.2f} GB, but {free / GB:.2f} GB are free; make "
            "room and run it again"
        )


def _sync(path: Path) -> None:
    """fsync a file, or a folder's entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
