"""Reads the rows of a source into the store, each by the format of the source."""

import unicodedata
from dataclasses import dataclass
from itertools import chain

import numpy as np
from tqdm import tqdm

from stages.preparing.contract import Drops
from stages.preparing.formats import Format
from stages.preparing.messages import Unusable, names_of
from stages.preparing.recognizing import recognize, refuse_lost
from stages.preparing.splitting import Store
from stages.shared.mix import label
from stages.shared.params import Mixed, Prepare, Source
from stages.shared.paths import RAW
from stages.shared.process import StageError
from stages.shared.readers import files_to_read, read_file, split_of
from stages.shared.screen import on_screen, tell

# Unused columns and message keys that are named.
_MOST_NAMED = 50


@dataclass(frozen=True)
class Scanned:
    """One source as read: its label for messages, its share (None for the first), its files to
    split or train on, its files to evaluate on, its format, and rows dropped while reading."""

    label: str
    share: float | None
    names: list[str]
    given: list[str]
    form: Format
    unreadable: Drops


def owners(store: Store, parts: list[Scanned]) -> np.ndarray:
    """int [N]: the source index of each row."""
    of = np.zeros(len(store), int)
    for number, part in enumerate(parts):
        of[store.in_files(part.names + part.given)] = number
    return of


def scan(folder: str, source: Source, number: int, params: Prepare, store: Store) -> Scanned:
    """Read every row of the source in `folder` of data/raw into `store`.

    A further source is read as its entry of dataset.mix says, without groups or evaluation file.
    """
    own: Prepare | Mixed = params
    section, eval_file, group_by, share = "prepare", params.eval_file, params.group_by, None
    if isinstance(source, Mixed):
        own, section, eval_file, group_by = source, source.section, None, None
        share = source.share
    train, given = (
        [f"{folder}/{name}" if folder else name for name in names]
        for names in files_to_read(RAW / folder, source, eval_file)
    )
    form: Format | None = None
    said: set[str | None] = set()
    known: set[str | None] = set()
    awaited = set((own.columns or {}).values())
    drops, names = Drops(), train + given
    size = sum((RAW / name).stat().st_size for name in names)
    files = "1 file" if len(names) == 1 else f"{len(names)} files"
    tell(f"prepare: reading {size / 1e6:.2f} MB in {files}: {', '.join(names[:5])}")
    for name in names:
        path = RAW / name
        for line, row in tqdm(read_file(path), on_screen(name), unit=" rows", disable=None):
            where = f"{path}:{line}"
            if form is None:
                form = recognize(own.format, own.columns, row, where, section)
                left = ignored(form, row, group_by)
                tell(f"prepare: {describe(form, row, left)}")
                said = {group_by, *left}
                known = said | {*form.columns.values()}
            refuse_lost(form, row, where, section)
            awaited -= row.keys()
            # Quick, since most rows have no other columns.
            if not row.keys() <= known:
                form.unused.update(f"column {c}" for c in form.not_used(row) if c not in said)
            drops.seen += 1
            if name not in given:
                refuse_test_row(row, source, where)
            try:
                store.add(name, line, form.example(row, where), group_of(row, group_by, where))
            except Unusable as why:
                drops.add(where, why)
    assert form is not None  # Every file has a row.
    if awaited:
        raise StageError(
            f"params.yaml: {section}.columns names {min(awaited)!r}, which no row of "
            f"{', '.join(names[:5])} has: correct or remove it"
        )
    drops.check()
    if form.unused:
        most = sorted(form.unused.most_common(_MOST_NAMED))
        counts = ", ".join(f"{key} ({count:,})" for key, count in most)
        more = len(form.unused) - len(most)
        tell(f"prepare: not used: {counts}" + f" and {more:,} more" * bool(more))
    return Scanned(label(source, number), share, train, given, form, drops)


def refuse_test_row(row: dict, source: Source, where: str) -> None:
    """Raise StageError for a training row whose column `split` names another split."""
    split = row.get("split")
    if not isinstance(split, str) or split == source.split:
        return
    if split_of(split) in ("test", "validation"):
        mixed = isinstance(source, Mixed)
        remedy = " and leave it out" if mixed else ", and name that in prepare.eval_file"
        raise StageError(
            f"{where}: its column 'split' says {split!r}, but it would be trained on: move such "
            f"rows to a file of their own{remedy}"
        )


def group_of(row: dict, group_by: str | None, where: str) -> str:
    if group_by is None:
        return ""
    if group_by not in row:
        raise StageError(
            f"{where}: no column {group_by!r} (prepare.group_by); the columns are "
            f"{names_of(row)}: name one of them, or set prepare.group_by: null"
        )
    if row[group_by] in (None, ""):
        raise Unusable("empty", f"{group_by!r} is empty: name the row's group")
    return unicodedata.normalize("NFC", str(row[group_by]))


def ignored(form: Format, row: dict, group_by: str | None) -> list[str]:
    """The columns of the first row that no row uses."""
    names = {*form.columns.values(), *chain(*form.others.values()), group_by}
    return [name for name in row if name not in names]


def describe(form: Format, row: dict, left: list[str]) -> str:
    """A description of the format, the columns that it uses and those that are `left`."""
    named = [(name, own) for name in form.columns if (own := form.column(row, name)) in row]
    used = [f"{own} as {name}" if own != name else own for name, own in named]
    shape = f" in the {form.shape.name} shape" if form.shape else ""
    rest = f"; not used: {names_of(left)}" if left else ""
    return f"format {form.name}{shape}, columns {', '.join(used)}{rest}"
