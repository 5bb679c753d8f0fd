"""The sets of rows in data/prepared, their names, and which are held out. Validation rows are not:
they decide which training state is kept, so they cannot judge it.

A held-out set is identified by the prefix of its metrics: empty for the held-out rows of the data
set, `group_` for those of whole groups, `source_1_` for those of the first source in dataset.mix.
"""

import re
from collections.abc import Collection
from pathlib import Path

from stages.shared.paths import PREPARED

# Stem of the file -> display name.
SET_NAMES = {
    "train": "training",
    "validation": "validation rows",
    "eval": "held-out rows",
    "group": "held-out groups",
}
_SOURCE = re.compile(r"source_(\d+)")


def stem_of(prefix: str) -> str:
    """File stem of a held-out set, also its name in metrics/rows.csv."""
    return prefix.removesuffix("_") or "eval"


def set_name(stem: str) -> str:
    """Display name of the set with this file stem."""
    source = _SOURCE.fullmatch(stem)
    return f"held-out rows of source {source[1]}" if source else SET_NAMES[stem]


def held_out(stems: Collection[str]) -> list[str]:
    """The prefixes of the held-out sets among `stems`, in display order."""
    sources = [int(found[1]) for stem in stems if (found := _SOURCE.fullmatch(stem))]
    there = [prefix for prefix in ("", "group_") if stem_of(prefix) in stems]
    return there + [f"source_{number}_" for number in sorted(sources)]


def held_out_sets(prepared: Path = PREPARED) -> dict[str, Path]:
    """Prefix -> file of each held-out set; prepare.group_by and dataset.mix add some."""
    files = {file.stem: file for file in prepared.glob("*.arrow")}
    return {prefix: files[stem_of(prefix)] for prefix in held_out(files)}
