"""Rows of JSON: one object per line, one array of objects, or concatenated objects."""

import json
from collections.abc import Iterator
from pathlib import Path

from stages.shared.opening import MAX_ROW_BYTES, chunks_of, lines_of, named_twice, too_big
from stages.shared.process import StageError


class _Fault(Exception):
    """What is wrong with one row, without its place."""


def _unique(pairs: list[tuple]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise _Fault(
            f"the key {named_twice([name for name, _ in pairs])!r} appears twice; keep one"
        )
    return row


def _no_constant(name: str) -> None:
    raise _Fault(f"{name} is not a JSON value; write null or a number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    for number, text in lines_of(path):
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


def read_json(path: Path) -> Iterator[tuple[int, dict]]:
    """The objects of one array, or concatenated objects, without holding the file in memory."""
    chunks = chunks_of(path)
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
                    f"{path}:{line}: broken JSON; there is text after the closing bracket"
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
            f"{path}:{line}: broken JSON; the array is not closed: the file is truncated"
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
            # At the end of a chunk a complete value looks broken, so read on first.
            more = next(chunks, "") if size <= MAX_ROW_BYTES else ""
            if not more:
                if size > MAX_ROW_BYTES:
                    raise too_big(f"{path}:{line}") from None
                where = f"{path}:{line + text.count(chr(10), 0, position)}"
                raise StageError(
                    f"{where}: broken JSON ({error.msg}); fix it or fetch the file again"
                ) from None
            text += more
        except (_Fault, RecursionError, ValueError) as error:
            raise StageError(f"{path}:{line}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply; a row is a flat object"
    return str(error) if isinstance(error, _Fault) else "a number with too many digits"


def _object(where: str, row) -> dict:
    if not isinstance(row, dict):
        kind = {list: "an array", str: "text", type(None): "null"}.get(type(row), "a number")
        raise StageError(f'{where}: {kind} where an object such as {{"prompt": …}} belongs')
    return row
