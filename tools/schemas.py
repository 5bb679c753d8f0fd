"""Schemas of the files that the tools read, written by DVC, stages or people.

A wrong type is reported in one line that names the place. Keys that the tools do not use are
ignored.
"""

import functools
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
)
from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.error import MarkedYAMLError

from stages.shared.foreign import held_to
from stages.shared.process import StageError

# ruamel.yaml needs half a minute for more, and aliases can expand a small file endlessly.
MOST_BYTES, MOST_VALUES = 1_000_000, 100_000
T = TypeVar("T")


class Entry(NamedTuple):
    """`path`, or `path: {option: value}`, in a list of dvc.yaml."""

    path: str
    options: dict[str, Any]


def _entry(value: Any) -> Entry:
    if isinstance(value, dict) and len(value) == 1:
        [(value, options)] = value.items()
    else:
        options = None
    if not isinstance(value, str):
        raise ValueError("must be a path, or one path with its options")
    return Entry(value, options if isinstance(options, dict) else {})


def _scalar(value: Any) -> Any:
    if value is not None and not isinstance(value, int | float | str):
        raise ValueError("must be a number or text")
    # Python's integers are unbounded; floats are not.
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("must be a number of 64 bits")
    return value


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)


def _without_tables(values: Any) -> Any:
    """Without lists, which DVC neither shows nor compares."""
    if not isinstance(values, dict):
        return values
    return {key: value for key, value in values.items() if not _is_table(value)}


# Used to find, and delete, cache files: it must not be a path.
Md5 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}(\.dir)?$")]
Entries = list[Annotated[Entry, PlainValidator(_entry)]]


class Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class Stage(Part):
    """A stage of dvc.yaml; a template (foreach, matrix) has none of these keys."""

    cmd: Any = None
    deps: Entries = []
    params: Entries = []
    outs: Entries = []
    metrics: Entries = []
    plots: Entries = []

    def paths(self, *kinds: str) -> list[str]:
        return [entry.path for kind in kinds for entry in getattr(self, kind)]


class Pipeline(Part):
    """dvc.yaml"""

    stages: dict[str, Stage] = {}

    def declared(self, *kinds: str) -> list[str]:
        """Paths of the outputs of `kinds` ("metrics", "plots"), in the file's order."""
        return [path for stage in self.stages.values() for path in stage.paths(*kinds)]


class Stored(Part):
    path: str
    md5: Md5


class Run(Part):
    """A stage's last run as recorded in dvc.lock."""

    cmd: Any = None
    deps: list[Stored] = []
    params: dict[str, dict[str, Any]] = {}
    outs: list[Stored] = []


class Lock(Part):
    """dvc.lock"""

    stages: dict[str, Run] = {}


class Added(Part):
    md5: Md5 | None = None


class Tracked(Part):
    """NAME.dvc, written by `dvc add`."""

    outs: list[Added] = []


class Listed(Part):
    """One file of a folder in a listing of DVC's cache."""

    md5: Md5


TRACKED, LISTING = TypeAdapter(Tracked), TypeAdapter(list[Listed])
PIPELINE, LOCK = TypeAdapter(Pipeline), TypeAdapter(Lock)
PARAMS = TypeAdapter(dict[str, Any])
METRICS = TypeAdapter(
    Annotated[dict[str, Annotated[Any, AfterValidator(_scalar)]], BeforeValidator(_without_tables)]
)


def read_yaml(content: bytes, schema: TypeAdapter[T], where: str) -> T:
    """Parse YAML 1.2 as DVC does. Raises StageError with the line; `where` names the file."""
    if len(content) > MOST_BYTES:
        raise StageError(f"{where}: more than {MOST_BYTES // 10**6} MB, which is too large")
    try:
        value = _load(content)
    except MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise StageError(f"{where}{line}: not YAML: {error.problem}") from None
    # Constructors of its types raise Python's own errors.
    except (YAMLError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise StageError(f"{where}: not YAML: {_first_line(error)}") from None
    except RecursionError:
        raise StageError(f"{where}: not YAML: nested too deeply") from None
    if why := _unusable(value):
        raise StageError(f"{where}: {why}")
    return held_to(schema, value, where)


@functools.cache
def _load(content: bytes) -> Any:
    """Cached, since revisions share most files; the result must not be changed."""
    return YAML(typ="safe", pure=True).load(content)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _unusable(value: Any) -> str | None:
    """Why no tool can use a parsed value; None if nothing is wrong."""
    waiting, seen = [value], 0
    while waiting:
        one = waiting.pop()
        seen += 1
        if seen > MOST_VALUES:
            return f"its aliases expand to more than {MOST_VALUES:,} values"
        # YAML's hexadecimal ones may have more digits than Python prints.
        if isinstance(one, int) and one.bit_length() > 64:
            return "a number has more than 64 bits"
        if isinstance(one, dict):
            waiting += one
            waiting += one.values()
        elif isinstance(one, list | set | tuple):
            waiting += one
    return None
