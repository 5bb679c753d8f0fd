"""Rows of Parquet, including values that Python cannot represent."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from stages.shared.opening import (
    CHUNK_BYTES,
    DAMAGED,
    compression_of,
    damaged,
    named_twice,
    open_file,
)
from stages.shared.process import StageError

_BATCH = 1000
# Raised by Arrow for a value that Python cannot represent.
_NO_PYTHON = (ArithmeticError, LookupError, ValueError, pa.ArrowException)


def read_parquet(path: Path) -> Iterator[tuple[int, dict]]:
    number = 0
    try:
        with open_file(path) as packed, tempfile.TemporaryFile() as unpacked:
            source = str(path)
            if compression_of(path):
                # Parquet is read from its end, so it is decompressed to an unnamed file.
                shutil.copyfileobj(packed, unpacked, CHUNK_BYTES)
                unpacked.flush()
                source = f"/proc/self/fd/{unpacked.fileno()}"
            file = pa.parquet.ParquetFile(source, pre_buffer=False, buffer_size=CHUNK_BYTES)
            if (twice := named_twice(file.schema_arrow.names)) is not None:
                raise StageError(f"{path}: the column {twice!r} appears twice; rename one")
            for batch in file.iter_batches(batch_size=_BATCH, use_threads=False):
                for row in _rows(path, number, batch):
                    number += 1
                    yield number, {name: _without_nulls(value) for name, value in row.items()}
    except (UnicodeDecodeError, *DAMAGED) as error:
        raise damaged(path, error) from None


def _without_nulls(value):
    """A value without the nulls that Arrow adds if an object lacks a key."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


class Unreadable:
    """Stands for a value that Python cannot represent. An error only if its column is used."""

    kind = "what Python cannot read (a date after the year 9999, a field twice, no UTF-8?)"

    def __init__(self, where: str):
        self.where = where

    def __str__(self) -> str:
        raise StageError(f"{self.where} contains {self.kind}; store it as text")


def _rows(path: Path, before: int, batch: pa.RecordBatch) -> Iterator[dict]:
    """The rows of a batch that is preceded by `before` rows in the file."""
    names = batch.schema.names
    place = f"{path}: rows {before + 1} to {before + batch.num_rows}"
    columns = [
        _values(column, name, place) for name, column in zip(names, batch.columns, strict=True)
    ]
    return (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))


def _values(column: pa.Array, name: str, place: str) -> list:
    try:
        return column.to_pylist(maps_as_pydicts="strict")
    except _NO_PYTHON:
        return [_value_of(value, name, place) for value in column]


def _value_of(value: pa.Scalar, name: str, place: str) -> object:
    try:
        return value.as_py(maps_as_pydicts="strict")
    except _NO_PYTHON as error:
        _, twice, key = str(error).rpartition("duplicate key was ")
        if twice:
            key = key.split(")")[0]
            raise StageError(f"{place}: a map has the key {key} twice; keep one") from None
        return Unreadable(f"{place}: {name!r}")
