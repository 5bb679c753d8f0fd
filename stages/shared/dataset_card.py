"""Reads a repository's card, the YAML at the head of its README.md.

Does not use `datasets.utils.metadata`, which takes a second to import and refuses a whole card for
one unknown or malformed entry.
"""

import fnmatch
from functools import partial
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BeforeValidator, ValidationError

from stages.shared.bounded import bounded
from stages.shared.foreign import Foreign, fault
from stages.shared.params import Source
from stages.shared.process import StageError
from stages.shared.screen import tell


def _words(value: object) -> object:
    """Numbers as text: a licence or a configuration may be called 2.0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if number else value


def _mappings(value: object) -> object:
    """Without the stray words that real cards have among their configurations."""
    return [e for e in value if isinstance(e, dict)] if isinstance(value, list) else value


Words = Annotated[str, BeforeValidator(_words)]


class Files(Foreign):
    split: Words | None = None
    path: Words | list[Words] | None = None


class Configuration(Foreign):
    config_name: Words | None = None
    default: bool | None = None
    data_dir: Words | None = None
    data_files: Words | Files | list[Words | Files] | None = None


class Card(Foreign):
    license: Words | list[Words] | None = None
    license_name: Words | list[Words] | None = None
    configs: Annotated[list[Configuration], BeforeValidator(_mappings)] | None = None


def read_card(folder: Path) -> dict:
    """The card in `folder`; empty if there is none or, with a warning, if it cannot be read.

    Raises StageError if reading it takes too much time or memory.
    """
    path = folder / "README.md"
    if not path.is_file():
        return {}
    card, warning = bounded(partial(_read, path), str(path), "remove the YAML at its head")
    if warning:
        tell(warning)
    return card


def _read(path: Path) -> tuple[dict, str | None]:
    from huggingface_hub.repocard import metadata_load

    try:
        return known_of(metadata_load(path) or {})
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return {}, _warning("it is not YAML")


def known_of(card: dict) -> tuple[dict, str | None]:
    """The keys of a card that are used here, and a warning about a malformed key, which is
    dropped."""
    card = (
        {k: v for k, v in card.items() if k in Card.model_fields} if isinstance(card, dict) else {}
    )
    warning = None
    while True:
        try:
            return Card.model_validate(card).model_dump(exclude_none=True), warning
        except ValidationError as error:
            warning = warning or _warning(fault(error))
            del card[error.errors(include_url=False)[0]["loc"][0]]


def license_in(card: dict) -> str | None:
    """The licence in a card: the Hub's short name, or the name for `other`."""
    names = card.get("license_name") if card.get("license") == "other" else card.get("license")
    return ", ".join(map(str, names)) if isinstance(names, list) else names


def _warning(reason: str) -> str:
    return f"warning: the head of README.md: {reason}; licence or configurations are unknown"


def listed_files(card: dict, section: Source) -> dict[str | None, list[str]]:
    """Split -> patterns of the files of `section.config`; None -> those without a split.

    Empty if the card lists no configurations. Raises StageError if it lists only others.
    """
    named = [entry for entry in card.get("configs", []) if "config_name" in entry]
    configs = {entry["config_name"]: entry for entry in named}
    default = [n for n, c in configs.items() if c.get("default") or len(configs) == 1]
    wanted = section.config or next(iter(default), "default")
    if wanted not in configs:
        if section.config or configs:
            raise StageError(
                f"{section.section}.config: {section.id} has no configuration {wanted}; its "
                f"README.md lists: {', '.join(configs) or 'none'}"
            )
        return {}
    inside = configs[wanted].get("data_dir", "").strip("./")
    files = configs[wanted].get("data_files") or "**"
    found: dict[str | None, list[str]] = {}
    for each in files if isinstance(files, list) else [files]:
        entry = each if isinstance(each, dict) else {"path": each}
        split, paths = entry.get("split"), entry.get("path")
        for path in paths if isinstance(paths, list) else [paths]:
            pattern = f"{inside}/{path}" if inside else str(path).removeprefix("./")
            found.setdefault(split, []).append(pattern)
    return found


def matching(names: list[str], patterns: list[str]) -> list[str]:
    """Those of `names` that match one of `patterns`."""
    # fnmatch's * crosses folders, so ** works too.
    patterns = [*patterns, *(pattern.replace("**/", "") for pattern in patterns)]
    return [n for n in names if any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns)]
