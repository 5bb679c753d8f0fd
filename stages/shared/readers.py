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
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet

from stages.shared.dataset_card import listed_files, matching, read_card
from stages.shared.params import Dataset
from stages.shared.process import DISK_FAULTS, StageError

# A row is one example, and no context window holds this much text.
MAX_ROW_BYTES = 16_000_000
_CHUNK = 1 << 20
_PARQUET_BATCH = 1000
_COMPRESSED: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: io.BufferedReader(pa.input_stream(str(path), compression="zstd")),
}
# How files of one split are named, as the datasets library reads names.
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# As the library names what it writes; all before the numbers is the split.
_SHARD = re.compile(r"(?P<split>\w+)-\d{5}-of-(?P<count>\d{5})")
# How their content begins, whatever a download called the file.
_MAGIC = {
    ".gz": re.compile(rb"\x1f\x8b"),
    ".bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    ".xz": re.compile(rb"\xfd7zXZ\0"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd"),
}
# Other beginnings of what is no text, and what to do about it.
_NO_TEXT = {
    b"version https://git-lfs": "a Git LFS pointer, not the data; run git lfs pull there",
    b"PAR1": "a Parquet file by its content; name it .parquet",
    b"ARROW1": "an Arrow file; save it as Parquet",
    b"PK\x03\x04": "a zip archive, as .xlsx is one; unpack it, or save the sheet as .csv",
}
_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, pa.ArrowException, OSError)


def kind_of(path: Path) -> str | None:
    """The suffix that decides the reader, compression left aside: `.csv` for `a.csv.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _READERS else None


def files_to_read(
    folder: Path, dataset: Dataset, eval_file: str | None
) -> tuple[list[str], list[str]]:
    """Names of the files in `folder`: those to split or train on, and the held-out set's."""
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and kind_of(path) and path != folder / "source.json"
    )
    given = [] if eval_file is None else matching(names, [eval_file])
    if eval_file in names:
        given = [eval_file]
    elif eval_file is not None and not given:
        near = difflib.get_close_matches(eval_file, names, 1, 0) or ["no data file"]
        raise StageError(f"prepare.eval_file: no file {eval_file} in {folder}; there is {near[0]}")
    others = [name for name in names if name not in given]
    chosen = _of_split(folder, others, dataset) if dataset.source == "hub" else others
    if not chosen:
        raise StageError(f"{folder}: no data file; name another source in {dataset.section}.id")
    if dataset.source != "hub":
        _check_together(folder, chosen)
    return chosen, given


def _check_together(folder: Path, names: list[str]) -> None:
    """Raise StageError for files of several splits: who put them there may not want them mixed."""
    splits = {name: split_of(name) for name in names}
    aside = [name for name in names if _word_of(name) in ("test", "validation")]
    if aside and len(aside) < len(names):
        other = next(name for name in names if name not in aside)
        shards = [name for name in aside if splits[name] == splits[aside[0]]]
        pattern = _SHARD.sub(r"\g<split>-*", aside[0]) if len(shards) > 1 else "it"
        raise StageError(
            f"{folder}: {aside[0]} stands beside {other}; name {pattern} in prepare.eval_file, or "
            f"take {'them' if len(shards) > 1 else 'it'} out of the folder"
        )
    sharded = {splits[name]: name for name in names if splits[name] and _SHARD.search(name)}
    if len(sharded) > 1:
        first, second, *_ = sharded.values()
        raise StageError(
            f"{folder}: {first} stands beside {second}, and they are of two splits; take one of "
            "them out of the folder, or rename them alike to train on both"
        )


def _of_split(folder: Path, names: list[str], dataset: Dataset) -> list[str]:
    """Those of `names` that hold dataset.split (null: "train") by README.md or by name."""
    wanted = dataset.split or "train"
    listed = listed_files(read_card(folder), dataset)
    splits = [split for split in listed if split is not None]
    if splits:
        chosen = matching(names, listed.get(wanted, []))
    else:
        chosen = [name for name in names if split_of(name) == wanted]
        for word in ("train", None) if dataset.split is None and not chosen else ():
            alike = [name for name in names if _word_of(name) == word]
            if len({split_of(name) for name in alike}) == 1:
                chosen = chosen or alike
    if not chosen:
        there = splits or sorted({split_of(name) or name for name in names})
        raise StageError(
            f"{dataset.section}.split: no file of split {wanted}; there is {', '.join(there)}"
        )
    return chosen


def split_of(name: str) -> str | None:
    """The split that a file's name or folder speaks of: `test` for data/test-00000.parquet, and
    `test_sft` for data/test_sft-00000-of-00002.parquet, as the datasets library has it."""
    word, shard = _word_of(name), _SHARD.search(name)
    if word is None or shard is None or shard["split"] in _SPLIT_WORDS[word]:
        return word
    return shard["split"]


def _word_of(name: str) -> str | None:
    words = re.split(r"[^a-z]+", name.lower())
    return next((s for s, called in _SPLIT_WORDS.items() if set(called) & set(words)), None)


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
    start = _start(path)
    for beginning, remedy in _NO_TEXT.items():
        if start.startswith(beginning) and kind != ".parquet":
            raise StageError(f"{path}: {remedy}")
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise StageError(f"{path}: a web page, not data; download the file itself")
    row = None
    for row in _READERS[kind](path):
        yield row
    if row is None:
        raise StageError(f"{path}: no row in the file; fetch it again or leave it out")


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)


def _compression(path: Path) -> str | None:
    """What `path` is compressed with, by its content and then by its name."""
    start = _start(path)
    found = [suffix for suffix, magic in _MAGIC.items() if magic.match(start)]
    return next(iter(found), path.suffix.lower() if path.suffix.lower() in _COMPRESSED else None)


def _open(path: Path) -> BinaryIO:
    compression = _compression(path)
    return _COMPRESSED[compression](path) if compression else path.open("rb")


def _damaged(path: Path, error: Exception) -> StageError:
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
            f"{where}: binary data where text belongs; another kind of file, or compressed twice?"
        )
    return StageError(
        f"{where}: not UTF-8 (byte 0x{raw[position]:02x}); save the file as UTF-8, "
        "for example: iconv -f latin1 -t utf-8"
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends, decoded; a byte order mark is skipped."""
    try:
        with _open(path) as file:
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
    except _DAMAGED as error:
        raise _damaged(path, error) from None


def _ended(file: BinaryIO) -> Iterator[bytes]:
    """Lines with their ends, cut after MAX_ROW_BYTES + 1. A file of no \\n is cut at each \\r."""
    lines = iter(partial(file.readline, MAX_ROW_BYTES + 1), b"")
    rest = next(lines, b"")
    if b"\n" in rest or b"\r" not in rest:
        yield rest
        yield from lines
        return
    while rest:
        *whole, rest = rest.split(b"\r")
        yield from (line + b"\r" for line in whole)
        if len(rest) > MAX_ROW_BYTES or not (chunk := file.read(_CHUNK)):
            yield from [rest] * bool(rest)
            return
        rest += chunk


def _twice(names: Sequence[str]) -> str | None:
    """The first name that stands there twice. Of many names each is looked at once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def too_big(where: str) -> StageError:
    return StageError(
        f"{where}: a row of more than {MAX_ROW_BYTES // 10**6} MB; a row is one example: "
        "put each on a line of its own, or cut it up"
    )


def _unique(pairs: list[tuple]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise _Fault(f"the key {_twice([name for name, _ in pairs])!r} stands twice; keep one")
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
    texts = (text for _, text in _lines(path))
    reader = csv.reader(texts, strict=True, delimiter=delimiter)
    header: list[str] = []
    before = 0
    while True:
        line = before + reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise _csv_fault(f"{path}:{line}", error) from None
        if fields is None:
            return
        if not fields:
            continue
        if not header:
            if len(fields) > 1 and all(name.startswith(" ") for name in fields[1:]):
                # Separators with a blank behind them: it belongs to no value either, and before a
                # quote would make the quote a character of the field.
                before = reader.line_num
                fields[1:] = [next(csv.reader([f], skipinitialspace=True))[0] for f in fields[1:]]
                reader = csv.reader(texts, strict=True, delimiter=delimiter, skipinitialspace=True)
            header = _header(f"{path}:{line}", fields, delimiter)
        elif len(fields) != len(header):
            raise StageError(
                f"{path}:{line}: {len(fields)} fields where the header has {len(header)}; put "
                "quotes around a field that holds the separator, and close every quote"
            )
        else:
            yield line, dict(zip(header, fields, strict=True))


def _csv_fault(where: str, error: csv.Error) -> StageError:
    if "field larger" in str(error):
        return too_big(where)
    if "new-line" in str(error):
        return StageError(
            f"{where}: a carriage return within the line; put quotes around the field that holds "
            "it, or end every line alike (tr '\\r' '\\n')"
        )
    return StageError(
        f"{where}: broken quoting ({error}); a quote inside a quoted field is written twice "
        '("") and each one opened is closed'
    )


def _header(where: str, names: list[str], delimiter: str) -> list[str]:
    for other in ";\t|,":
        if len(names) == 1 and other != delimiter and other in names[0]:
            raise StageError(
                f"{where}: one column, {names[0][:60]!r}; its separator seems to be {other!r}: "
                "save it with commas as .csv, or with tabs as .tsv"
            )
    names = [name.strip() for name in names]
    if not all(names):
        raise StageError(f"{where}: a column without a name; name every column")
    if (twice := _twice(names)) is not None:
        raise StageError(f"{where}: the column {twice!r} stands twice; rename one")
    return names


def _read_parquet(path: Path) -> Iterator[tuple[int, dict]]:
    number = 0
    try:
        with _open(path) as packed, tempfile.TemporaryFile() as unpacked:
            source = str(path)
            if _compression(path):
                # Parquet is read from its end, so it goes to disk, without a name there.
                shutil.copyfileobj(packed, unpacked, _CHUNK)
                unpacked.flush()
                source = f"/proc/self/fd/{unpacked.fileno()}"
            file = pa.parquet.ParquetFile(source, pre_buffer=False, buffer_size=_CHUNK)
            if (twice := _twice(file.schema_arrow.names)) is not None:
                raise StageError(f"{path}: the column {twice!r} stands twice; rename one")
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH, use_threads=False):
                for row in _rows(path, number, batch):
                    number += 1
                    yield number, {name: _without_nulls(value) for name, value in row.items()}
    except (UnicodeDecodeError, *_DAMAGED) as error:
        raise _damaged(path, error) from None


def _without_nulls(value):
    """A value of a column without the nulls that Arrow puts where an object lacks a key."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _rows(path: Path, before: int, batch: pa.RecordBatch) -> list[dict]:
    try:
        return batch.to_pylist(maps_as_pydicts="strict")
    except KeyError as error:
        place = f"rows {before + 1} to {before + batch.num_rows}"
        key = str(error).rpartition("key was ")[2].split(")")[0]
        raise StageError(f"{path}: {place}: a map has the key {key} twice; keep one") from None


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, dict]]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".parquet": _read_parquet,
}
