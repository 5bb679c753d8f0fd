"""What others wrote, held to a schema at the door: of another type, it is refused in one line."""

import json
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from stages.shared.process import StageError
from stages.shared.screen import brief

# The index of the largest models has 10 MB.
_LARGEST = 200_000_000


class Foreign(BaseModel):
    """Keys that a schema does not name are nobody's concern here."""

    model_config = ConfigDict(
        extra="ignore", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )


Schema = TypeVar("Schema", bound=Foreign)


def read_object(path: Path, where: str | None = None) -> dict:
    """The JSON object in `path`; `where` is what to call it. Raises StageError."""
    where = where or str(path)
    if (size := path.stat().st_size) > _LARGEST:
        raise StageError(f"{where}: {size / 1e6:.0f} MB are too many for this file")
    try:
        data = json.loads(path.read_bytes())
    except UnicodeDecodeError:
        raise StageError(f"{where}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise StageError(f"{where}: not valid JSON ({error})") from None
    except ValueError:
        raise StageError(f"{where}: not valid JSON (a number with too many digits)") from None
    except RecursionError:
        raise StageError(f"{where}: not valid JSON (nested too deeply)") from None
    if not isinstance(data, dict):
        raise StageError(f"{where}: must hold an object")
    return data


def held_to(schema: type[Schema], data: object, where: str) -> Schema:
    """`data` as the schema has it. Raises StageError with the first key that is wrong."""
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise StageError(f"{where}: {fault(error)}") from None


def fault(error: ValidationError) -> str:
    """The first of the faults, as `key: what it must be (got what it is)`."""
    first, *_ = error.errors(include_url=False, include_context=False)
    key = ".".join(part if isinstance(part, str) else str(part) for part in first["loc"][:3])
    if first["type"] == "missing":
        return f"{key[:100]} is missing"
    rule = first["msg"].replace("Input should", "must").removeprefix("Value error, ")
    return f"{key[:100]}: {rule} (got {brief(first['input'])})"
