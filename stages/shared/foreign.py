"""Validates untrusted files against schemas; a wrong type is refused in one line."""

import json
import re
import stat
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from stages.shared.process import StageError
from stages.shared.screen import brief, on_screen, rule

# The index of the largest models has 10 MB.
_LARGEST = 200_000_000
T = TypeVar("T")
_UNUSABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class Foreign(BaseModel):
    """Ignores keys that are not in the schema."""

    model_config = ConfigDict(
        extra="ignore", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )


def read_json(content: bytes, schema: type[T] | TypeAdapter[T], where: str) -> T:
    """JSON, including NaN and Infinity, validated against `schema`; `where` names it in errors.

    Raises StageError.
    """
    return held_to(schema, _parsed(content, where), where)


def _parsed(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except RecursionError:
        reason = "nested too deeply"
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        reason = str(error)
    except ValueError:
        reason = "a number with too many digits"
    raise StageError(f"{where}: not JSON: {reason}")


def read_object(path: Path, where: str | None = None) -> dict:
    """The JSON object in `path`; `where` names it in errors. Raises StageError."""
    where = where or str(path)
    found = path.stat()
    # Opening a FIFO would wait for ever.
    if not stat.S_ISREG(found.st_mode):
        raise StageError(f"{where}: not a file")
    if found.st_size > _LARGEST:
        raise StageError(f"{where}: {found.st_size / 1e6:.0f} MB are too large for this file")
    return read_json(path.read_bytes(), dict, where)


def held_to(schema: type[T] | TypeAdapter[T], data: object, where: str) -> T:
    """`data` validated against `schema`. Raises StageError with the first error."""
    adapter = schema if isinstance(schema, TypeAdapter) else TypeAdapter(schema)
    try:
        return adapter.validate_python(data, strict=True)
    except ValidationError as error:
        raise StageError(f"{where}: {fault(error)}") from None


def fault(error: ValidationError) -> str:
    """The first error, as `key: key: what it must be (got what it is)`."""
    first, *_ = error.errors(include_url=False)
    place = [on_screen(part, 60) for part in first["loc"] if part != "[key]"]
    shown = first["type"] not in ("missing", "too_short")
    return ": ".join([*place, rule(first)]) + f" (got {brief(first['input'])})" * shown


def check_name(name: str, source: str) -> str:
    """`name` if it stays within its folder and its list of checksums. Raises StageError."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
        raise StageError(f"{source}: the file name {name!r} leads out of its folder")
    if _UNUSABLE.search(name):
        raise StageError(
            f"{source}: the file name {name!r} contains a line end, a control character or bytes "
            "that are not UTF-8; rename it"
        )
    return name
