"""Rows of CSV and TSV."""

import csv
from collections.abc import Iterator
from pathlib import Path

from stages.shared.opening import MAX_ROW_BYTES, lines_of, named_twice, too_big
from stages.shared.process import StageError


def read_csv(path: Path, delimiter: str = ",") -> Iterator[tuple[int, dict]]:
    csv.field_size_limit(MAX_ROW_BYTES)
    texts = (text for _, text in lines_of(path))
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
                # A space after the separator is not part of the value, and before a quote it would
                # make the quote a character of the field.
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
            f"{where}: a carriage return within the line; put quotes around the field that has "
            "it, or end all lines alike (tr '\\r' '\\n')"
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
    if (twice := named_twice(names)) is not None:
        raise StageError(f"{where}: the column {twice!r} appears twice; rename one")
    return names
