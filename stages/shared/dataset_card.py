"""What a repository's card, the YAML at the head of its README.md, says of its files.

Not by `datasets.utils.metadata`: importing it takes a second, and for a feature that it does not
know, or one entry that is not quite right, it refuses the whole card.
"""

import fnmatch
from pathlib import Path

import yaml

from stages.shared.params import Dataset
from stages.shared.process import StageError


def read_card(folder: Path) -> dict:
    """The card in `folder`: empty without one, and with a warning where it cannot be read."""
    from huggingface_hub.repocard import metadata_load

    try:
        return metadata_load(folder / "README.md") or {}
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, ValueError, RecursionError):
        print("warning: the head of README.md is no YAML: licence and configurations are unknown")
        return {}


def listed_files(card: dict, section: Dataset) -> dict[str | None, list[str]]:
    """Split -> patterns of the files of `section.config`; under None those without a split.

    Empty where the card lists no configurations. Raises StageError when it lists others.
    """
    listed = card.get("configs")
    entries = listed if isinstance(listed, list) else []
    named = [entry for entry in entries if isinstance(entry, dict) and "config_name" in entry]
    configs = {str(entry["config_name"]): entry for entry in named}
    default = [n for n, c in configs.items() if c.get("default") or len(configs) == 1]
    wanted = section.config or next(iter(default), "default")
    if wanted not in configs:
        if section.config or configs:
            raise StageError(
                f"{section.section}.config: {section.id} has no configuration {wanted}; its "
                f"README.md lists: {', '.join(configs) or 'none'}"
            )
        return {}
    inside = str(configs[wanted].get("data_dir") or "").strip("./")
    files = configs[wanted].get("data_files") or "**"
    found: dict[str | None, list[str]] = {}
    for each in files if isinstance(files, list) else [files]:
        entry = each if isinstance(each, dict) else {"path": each}
        split, paths = entry.get("split"), entry.get("path")
        for path in paths if isinstance(paths, list) else [paths]:
            pattern = f"{inside}/{path}" if inside else str(path).removeprefix("./")
            found.setdefault(split if split is None else str(split), []).append(pattern)
    return found


def matching(names: list[str], patterns: list[str]) -> list[str]:
    """Those of `names` that one of `patterns` fits."""
    # fnmatch's * crosses folders, so ** needs no more than this.
    patterns = [*patterns, *(pattern.replace("**/", "") for pattern in patterns)]
    return [n for n in names if any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns)]
