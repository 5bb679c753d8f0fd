"""The sets of rows in data/prepared: what they are called, and which are held out. Validation rows
are not: they decide which state of training is kept, so they cannot judge it."""

from pathlib import Path

from stages.shared.paths import PREPARED

# Stem of the file -> what people are told it is.
SET_NAMES = {
    "train": "training",
    "validation": "validation rows",
    "eval": "held-out rows",
    "group": "held-out groups",
}
# What the set's metrics begin with -> stem of the file.
HELD_OUT = {"": "eval", "group_": "group"}


def held_out_sets(prepared: Path = PREPARED) -> dict[str, Path]:
    """Metric prefix -> file of each held-out set; only prepare.group_by makes that of groups."""
    files = {prefix: prepared / f"{name}.arrow" for prefix, name in HELD_OUT.items()}
    return {prefix: file for prefix, file in files.items() if file.exists()}
