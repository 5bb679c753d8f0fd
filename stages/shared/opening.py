"""Opens data files with any compression, and decodes their text as a stream."""

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from stages.shared.process import DISK_FAULTS, StageError

# A row is one example, and no context window is this large.
MAX_ROW_BYTES = 16_000_000
CHUNK_BYTES = 1 << 20
COMPRESSED: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: io.BufferedReader(pa.input_stream(str(path), compression="zstd")),
}
# Magic bytes, since a download may have any name.
_MAGIC = {
    ".gz": re.compile(rb"\x1f\x8b"),
    ".bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    ".xz": re.compile(rb"\xfd7zXZ\0"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd"),
}
# Magic bytes of files that are not text, and what to do about them.
_NO_TEXT = {
    b"version https://git-lfs": "a Git LFS pointer, not the data; run git lfs pull there",
    b"PAR1": "a Parquet file by its content; name it .parquet",
    b"ARROW1": "an Arrow file; save it as Parquet",
    b"PK\x03\x04": "a zip archive, as .xlsx is one; unpack it, or save the sheet as .csv",
}
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, pa.ArrowException, OSError)


def check_data(path: Path, is_text: bool) -> None:
    """Raise StageError if a file is empty, or begins like something other than data."""
    if path.stat().st_size == 0:
        raise StageError(f"{path}: the file is empty; fetch it again or leave it out")
    start = _start(path)
    for beginning, remedy in _NO_TEXT.items():
        if start.startswith(beginning) and is_text:
            raise StageError(f"{path}: {remedy}")
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise StageError(f"{path}: a web page, not data; download the file itself")


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)


def compression_of(path: Path) -> str | None:
    """The compression of `path`, by its content, else by its name."""
    start = _start(path)
    found = [suffix for suffix, magic in _MAGIC.items() if magic.match(start)]
    return next(iter(found), path.suffix.lower() if path.suffix.lower() in COMPRESSED else None)


def open_file(path: Path) -> BinaryIO:
    compression = compression_of(path)
    return COMPRESSED[compression](path) if compression else path.open("rb")


def damaged(path: Path, error: Exception) -> StageError:
    if getattr(error, "errno", None) in DISK_FAULTS:
        raise error
    reason = " ".join(str(error).split())[:100] or type(error).__name__
    return StageError(
        f"{path}: cannot be read ({reason}); it is damaged or misnamed: fetch it again"
    )


def _not_utf8(where: str, raw: bytes, position: int) -> StageError:
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return StageError(
            f"{where}: UTF-16 text; save the file as UTF-8 (iconv -f utf-16 -t utf-8)"
        )
    if re.search(rb"[\0-\x08\x0e-\x1a]", raw):
        return StageError(
            f"{where}: binary data instead of text; another kind of file, or compressed twice?"
        )
    return StageError(
        f"{where}: not UTF-8 (byte 0x{raw[position]:02x}); save the file as UTF-8, "
        "for example: iconv -f latin1 -t utf-8"
    )


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their line ends, decoded; a byte order mark is skipped."""
    try:
        with open_file(path) as file:
            for number, raw in enumerate(_ended(file), 1):
                where = f"{path}:{number}"
                if len(raw) > MAX_ROW_BYTES:
                    raise too_big(where)
                if number == 1:
                    raw = raw.removeprefix(codecs.BOM_UTF8)
                try:
                    text = raw.decode()
                except UnicodeDecodeError as error:
                    raise _not_utf8(where, raw, error.start) from None
                if "\0" in text:
                    raise StageError(f"{where}: a NUL byte; remove it (tr -d '\\000')")
                yield number, text
    except DAMAGED as error:
        raise damaged(path, error) from None


def _ended(file: BinaryIO) -> Iterator[bytes]:
    """Lines with their ends, at most MAX_ROW_BYTES + 1 bytes. Without \\n, \\r ends a line."""
    lines = iter(partial(file.readline, MAX_ROW_BYTES + 1), b"")
    rest = next(lines, b"")
    if b"\n" in rest or b"\r" not in rest:
        yield rest
        yield from lines
        return
    while rest:
        *whole, rest = rest.split(b"\r")
        yield from (line + b"\r" for line in whole)
        if len(rest) > MAX_ROW_BYTES or not (chunk := file.read(CHUNK_BYTES)):
            yield from [rest] * bool(rest)
            return
        rest += chunk


def chunks_of(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    try:
        with open_file(path) as file:
            while True:
                raw = file.read(CHUNK_BYTES)
                try:
                    text = decoder.decode(raw, final=not raw)
                except UnicodeDecodeError as error:
                    where = f"{path}:{line + error.object.count(10, 0, error.start)}"
                    raise _not_utf8(where, error.object, error.start) from None
                if "\0" in text:
                    where = f"{path}:{line + text.count(chr(10), 0, text.index(chr(0)))}"
                    raise StageError(f"{where}: a NUL byte; remove it (tr -d '\\000')")
                line += text.count("\n")
                if text:
                    yield text
                if not raw:
                    return
    except DAMAGED as error:
        raise damaged(path, error) from None


def too_big(where: str) -> StageError:
    return StageError(
        f"{where}: a row of more than {MAX_ROW_BYTES // 10**6} MB; a row is one example: "
        "put each on a line of its own, or cut it up"
    )


def named_twice(names: Sequence[str]) -> str | None:
    """The first name that appears twice, in linear time."""
    return next((name for name, count in Counter(names).items() if count > 1), None)
