"""Files of rows (JSONL, JSON, CSV, TSV, Parquet; plain or compressed) as (line, row) pairs.

A row is a dict of column name to value. Every fault is a StageError that names file and line
and what to do. Files are streamed: memory holds one row, or one batch of a Parquet file.
"""

import bz2
import codecs
import csv
import difflib
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet

from stages.shared.dataset_card import listed_files, matching, read_card
from stages.shared.params import Dataset
from stages.shared.process import StageError

# A row is one example, and no context window holds this much text.
MAX_ROW_BYTES = 16_000_000
_CHUNK = 1 << 20
_PARQUET_BATCH = 1000
_COMPRESSED = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: io.BufferedReader(pa.input_stream(str(path), compression="zstd")),
}
# How files of one split are named, as the datasets library reads names.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# What Arrow raises for a value that it has and Python cannot hold.
_NO_PYTHON = (ArithmeticError, LookupError, ValueError, pa.ArrowException)
_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, pa.ArrowException, OSError)


def kind_of(path: Path) -> str | None:
    """The suffix that decides the reader, compression left aside: `.csv` for `a.csv.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _READERS else None


def files_to_read(folder: Path, dataset: Dataset, eval_file: str | None) -> list[str]:
    """Names of the files in `folder` to read: those of the split, and the evaluation file last."""
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and kind_of(path) and path != folder / "source.json"
    )
    if eval_file is not None and eval_file not in names:
        near = difflib.get_close_matches(eval_file, names, 1, 0) or ["no data file"]
        raise StageError(f"prepare.eval_file: no file {eval_file} in {folder}; there is {near[0]}")
    others = [name for name in names if name != eval_file]
    chosen = _of_split(folder, others, dataset) if dataset.source == "hub" else others
    if not chosen:
        raise StageError(f"{folder}: no data file; name another source in dataset.id")
    aside = [name for name in chosen if split_of(name) in ("test", "validation")]
    if len(aside) < len(chosen) and aside and dataset.source != "hub":
        raise StageError(
            f"{folder}: {aside[0]} stands beside {next(n for n in chosen if n not in aside)}; name "
            "it in prepare.eval_file, or take it out of the folder"
        )
    return chosen + [eval_file] * (eval_file is not None)


def _of_split(folder: Path, names: list[str], dataset: Dataset) -> list[str]:
    """Those of `names` that hold dataset.split (null: "train") by README.md or by name."""
    wanted = dataset.split or "train"
    listed = listed_files(read_card(folder), dataset)
    splits = [split for split in listed if split is not None]
    if splits:
        chosen = matching(names, listed.get(wanted, []))
    else:
        chosen = [name for name in names if split_of(name) == wanted]
        if not chosen and dataset.split is None:
            chosen = [name for name in names if split_of(name) is None]
    if not chosen:
        there = splits or sorted({split_of(name) or name for name in names})
        raise StageError(f"dataset.split: no file of split {wanted}; there is {', '.join(there)}")
    return chosen


def split_of(name: str) -> str | None:
    """The split that a file's name or folder speaks of: `test` for data/test-00000.parquet."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for split, called in _SPLITS.items() if set(called) & set(words)), None)


def read_file(path: Path) -> Iterator[tuple[int, dict]]:
    """(line, row) for every row of `path`; for Parquet the number of the row, from 1.

    Raises StageError for a file without a row, and for the first row that cannot be read.
    """
    kind = kind_of(path)
    if kind is None:
        known = " ".join(_READERS)
        raise StageError(f"{path}: unknown kind of file; known are {known}, also compressed")
    if path.stat().st_size == 0:
        raise StageError(f"{path}: the file is empty; fetch it again or leave it out")
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise StageError(f"{path}: a Git LFS pointer, not the data; run git lfs pull there")
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise StageError(f"{path}: a web page, not data; download the file itself")
    found = False
    for found in _READERS[kind](path):
        yield found
    if not found:
        raise StageError(f"{path}: no row in the file; fetch it again or leave it out")


def _open(path: Path) -> BinaryIO:
    return _COMPRESSED.get(path.suffix.lower(), lambda p: p.open("rb"))(path)


def _damaged(path: Path, error: Exception) -> StageError:
    reason = " ".join(str(error).split())[:100] or type(error).__name__
    return StageError(
        f"{path}: cannot be read ({reason}); it is damaged or misnamed: fetch it again"
    )


def _not_utf8(where: str, raw: bytes, position: int) -> StageError:
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return StageError(
            f"{where}: UTF-16 text; save the file as UTF-8 (iconv -f utf-16 -t utf-8)"
        )
    return StageError(
        f"{where}: not UTF-8 (byte 0x{raw[position]:02x}); save the file as UTF-8, "
        "for example: iconv -f latin1 -t utf-8"
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends, decoded; a byte order mark is skipped."""
    try:
        with _open(path) as file:
            number = 0
            while raw := file.readline(MAX_ROW_BYTES + 1):
                number += 1
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
    except _DAMAGED as error:
        raise _damaged(path, error) from None


def too_big(where: str) -> StageError:
    return StageError(
        f"{where}: a row of more than {MAX_ROW_BYTES // 10**6} MB; a row is one example: "
        "put each on a line of its own, or cut it up"
    )


def _unique(pairs: list[tuple]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Fault(f"the key {twice!r} stands twice; keep one")
    return row


def _no_constant(name: str) -> None:
    raise _Fault(f"{name} is no JSON value; write null or a number")


class _Fault(Exception):
    """What is wrong with one row, without its place."""


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    for number, text in _lines(path):
        if not text.strip():
            continue
        try:
            row = _DECODER.decode(text)
        except json.JSONDecodeError as error:
            raise StageError(
                f"{path}:{number}: broken JSON at character {error.pos + 1} ({error.msg}); "
                "each line must be one whole object"
            ) from None
        except (_Fault, RecursionError, ValueError) as error:
            raise StageError(f"{path}:{number}: {_reason(error)}") from None
        yield number, _object(f"{path}:{number}", row)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply; a row is a flat object"
    return str(error) if isinstance(error, _Fault) else "a number with too many digits"


def _object(where: str, row) -> dict:
    if not isinstance(row, dict):
        kind = {list: "an array", str: "text", type(None): "null"}.get(type(row), "a number")
        raise StageError(f'{where}: {kind} where an object such as {{"prompt": …}} belongs')
    return row


def _read_json(path: Path) -> Iterator[tuple[int, dict]]:
    """The objects of one array, or objects one after another, without holding the file."""
    chunks = _chunks(path)
    text, line, position = next(chunks, ""), 1, 0
    in_array = after_value = False
    while True:
        start = position
        while position < len(text) and text[position] in " \t\r\n":
            position += 1
        line += text.count("\n", start, position)
        if position == len(text):
            text, position = next(chunks, ""), 0
            if not text:
                break
        elif text[position] == "[" and not in_array and not after_value:
            in_array, position = True, position + 1
        elif text[position] == "," and in_array and after_value:
            after_value, position = False, position + 1
        elif text[position] == "]" and in_array:
            if text[position + 1 :].strip() or any(chunk.strip() for chunk in chunks):
                raise StageError(
                    f"{path}:{line}: broken JSON; something follows the closing bracket"
                )
            return
        else:
            if in_array and after_value:
                raise StageError(f"{path}:{line}: broken JSON; a comma is missing between rows")
            row, text, start, position = _value(path, line, text, position, chunks)
            yield line, _object(f"{path}:{line}", row)
            line += text.count("\n", start, position)
            after_value = True
    if in_array:
        raise StageError(
            f"{path}:{line}: broken JSON; the array is not closed: the file is cut off"
        )


def _value(path: Path, line: int, text: str, start: int, chunks: Iterator[str]) -> tuple:
    """The JSON value at `start`, reading on as needed: (value, text, its start, its end)."""
    while True:
        try:
            row, end = _DECODER.raw_decode(text, start)
            return row, text, start, end
        except json.JSONDecodeError as error:
            size, position = len(text) - start, error.pos - start
            text, start = text[start:], 0
            # Where the text is cut off a value looks broken: read on before it is called so.
            more = next(chunks, "") if size <= MAX_ROW_BYTES else ""
            if not more:
                if size > MAX_ROW_BYTES:
                    raise too_big(f"{path}:{line}") from None
                where = f"{path}:{line + text.count(chr(10), 0, position)}"
                raise StageError(
                    f"{where}: broken JSON ({error.msg}); mend it or fetch the file again"
                ) from None
            text += more
        except (_Fault, RecursionError, ValueError) as error:
            raise StageError(f"{path}:{line}: {_reason(error)}") from None


def _chunks(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    try:
        with _open(path) as file:
            while True:
                raw = file.read(_CHUNK)
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
    except _DAMAGED as error:
        raise _damaged(path, error) from None


def _read_csv(path: Path, delimiter: str = ",") -> Iterator[tuple[int, dict]]:
    csv.field_size_limit(MAX_ROW_BYTES)
    reader = csv.reader((text for _, text in _lines(path)), strict=True, delimiter=delimiter)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            if "field larger" in str(error):
                raise too_big(f"{path}:{line}") from None
            raise StageError(
                f"{path}:{line}: broken quoting ({error}); a quote inside a quoted field is "
                'written twice ("") and each one opened is closed'
            ) from None
        if fields is None:
            return
        if not fields:
            continue
        if not header:
            header = _header(f"{path}:{line}", fields, delimiter)
        elif len(fields) != len(header):
            raise StageError(
                f"{path}:{line}: {len(fields)} fields where the header has {len(header)}; put "
                "quotes around a field that holds the separator, and close every quote"
            )
        else:
            yield line, dict(zip(header, fields, strict=True))


def _header(where: str, names: list[str], delimiter: str) -> list[str]:
    for other in ";\t|,":
        if len(names) == 1 and other != delimiter and other in names[0]:
            raise StageError(
                f"{where}: one column, {names[0][:60]!r}; its separator seems to be {other!r}: "
                "save it with commas as .csv, or with tabs as .tsv"
            )
    for name in names:
        if not name.strip():
            raise StageError(f"{where}: a column without a name; name every column")
        if names.count(name) > 1:
            raise StageError(f"{where}: the column {name!r} stands twice; rename one")
    return names


def _read_parquet(path: Path) -> Iterator[tuple[int, dict]]:
    number = 0
    try:
        with _open(path) as stream:
            source = path if path.suffix == ".parquet" else pa.BufferReader(stream.read())
            file = pa.parquet.ParquetFile(source, pre_buffer=False)
            names = file.schema_arrow.names
            for name in names:
                if names.count(name) > 1:
                    raise StageError(f"{path}: the column {name!r} stands twice; rename one")
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH, use_threads=False):
                for row in _rows_of(batch, path, number):
                    number += 1
                    yield number, row
    except (UnicodeDecodeError, *_DAMAGED) as error:
        raise _damaged(path, error) from None


class Unreadable:
    """In the place of a value that Python cannot hold, such as a date after the year 9999.

    Nothing is wrong while its column is not used. Used as text, it says so.
    """

    def __init__(self, where: str):
        self.where = where

    def __str__(self) -> str:
        raise StageError(
            f"{self.where} cannot be read (a date beyond the year 9999, a field twice, no UTF-8?); "
            "store it as text"
        )


def _rows_of(batch: pa.RecordBatch, path: Path, before: int) -> Iterator[dict]:
    """The rows of a batch, which `before` rows come before in the file."""
    names = batch.schema.names
    columns = [
        _values(column, f"{path}: {name!r} after row {before}")
        for name, column in zip(names, batch.columns, strict=True)
    ]
    return (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))


def _values(column: pa.Array, where: str) -> list:
    try:
        return column.to_pylist()
    except _NO_PYTHON:
        return [_value_of(value, where) for value in column]


def _value_of(value: pa.Scalar, where: str) -> object:
    try:
        return value.as_py()
    except _NO_PYTHON:
        return Unreadable(where)


_READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".parquet": _read_parquet,
}
