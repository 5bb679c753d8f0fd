"""Several sources in one training set: the number of rows from each, and their order.

A share is a fraction of the training rows, as prepare.train_rows counts them. The first source
gets what the other shares leave.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from stages.preparing.formats import Format
from stages.preparing.scanning import Scanned
from stages.preparing.writing import CHUNK, Written
from stages.shared.process import StageError
from stages.shared.rows import SCHEMA


def check_together(parts: list[Scanned]) -> list[int]:
    """Indices of the sources that determine the template: all but plain text.

    Raises StageError if no single template serves all sources.
    """
    first, *others = [n for n, part in enumerate(parts) if part.form.name != "text"] or [0]
    for number in others:
        here, there = (_rendered(parts[n].form) for n in (number, first))
        if here != there:
            raise StageError(
                f"{parts[number].label}: its rows are {here}, those of {parts[first].label} are "
                f"{there}, but prompts at inference have one template; bring both as messages"
            )
    return [first, *others]


def _rendered(form: Format) -> str:
    if form.name != "rendered":
        return "not rendered yet"
    return f"already rendered, in the {form.shape.name} shape" if form.shape else "already rendered"


def rows_of_each(total: int, shares: Sequence[float]) -> list[int]:
    """The number of rows of each share of `total`, halves rounded up."""
    # Decimal, since 0.05 is slightly more in binary.
    return [math.floor(Fraction(str(share)) * total + Fraction(1, 2)) for share in shares]


def write_mixed(
    out: Path,
    pools: list[np.ndarray],
    parts: list[Scanned],
    limit: int | None,
    write: Callable[[str, np.ndarray, int | None], Written],
) -> Written:
    """Write train.arrow into `out`: rows of each of the `pools` (row numbers in the store, one
    pool per source) by its share, `limit` in all.

    Without a limit, or if the first source has fewer rows than its part, all its rows are taken
    and the others scaled to match. Raises StageError if another source has too few. write(name,
    pool, limit) writes a set into `out`.
    """
    shares = [part.share for part in parts if part.share is not None]
    wanted = None if limit is None else limit - sum(rows_of_each(limit, shares))
    if wanted is not None and wanted < 1:
        raise StageError(
            f"prepare.train_rows: {limit} leaves no row for {parts[0].label} beside the shares of "
            "dataset.mix; raise it"
        )
    names = [f"train-{number}" for number in range(len(parts))]
    written = [write(names[0], pools[0], wanted)]
    if not len(written[0].rows):
        raise StageError(f"{parts[0].label}: no row is left to train on; bring more rows")
    total = limit
    if total is None or len(written[0].rows) != wanted:
        rest = 1 - sum(Fraction(str(share)) for share in shares)
        total = math.floor(len(written[0].rows) / rest + Fraction(1, 2))
    for number, count in enumerate(rows_of_each(total, shares), 1):
        asked = f"{parts[number].label}: a share of {shares[number - 1]:g} of {total:,} training "
        if not count:
            raise StageError(f"{asked}rows is less than one row; raise it, or prepare.train_rows")
        written.append(write(names[number], pools[number], count))
        if (there := len(written[-1].rows)) < count:
            raise StageError(
                f"{asked}rows is {count:,}, but it has {there:,} to train on; lower the share, or "
                "prepare.train_rows, or bring more rows"
            )
    files = [out / f"{name}.arrow" for name in names]
    mixed = interleave(files, written, out / "train.arrow")
    for file in files:
        file.unlink()
    return mixed


def interleave(files: list[Path], written: list[Written], out: Path) -> Written:
    """Write the rows of all `files` to `out`, each file's spread evenly and in order: row i of n
    is placed at (i + 0.5) / n."""
    sizes = [len(each.rows) for each in written]
    places = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    order = np.argsort(places, kind="stable")
    owner = np.repeat(np.arange(len(sizes)), sizes)[order]
    done = np.zeros(len(sizes), int)
    with (
        contextlib.ExitStack() as stack,
        pa.OSFile(str(out), "wb") as sink,
        pa.ipc.new_stream(sink, SCHEMA) as stream,
    ):
        opened = [stack.enter_context(pa.memory_map(str(file))) for file in files]
        tables = [pa.ipc.open_stream(source).read_all() for source in opened]
        for start in range(0, len(order), CHUNK):
            of = owner[start : start + CHUNK]
            counts = np.bincount(of, minlength=len(sizes))
            pieces = [
                table.slice(begin, count)
                for table, begin, count in zip(tables, done, counts, strict=True)
            ]
            done += counts
            # Index of each row of the chunk in the concatenated pieces.
            at = np.argsort(np.argsort(of, kind="stable"))
            chunk = pa.concat_tables(pieces).combine_chunks().take(pa.array(at)).combine_chunks()
            for batch in chunk.to_batches():
                stream.write_batch(batch)
    return Written(
        np.concatenate([each.rows for each in written])[order],
        sum(each.learned for each in written),
        sum(each.candidates for each in written),
        sum(each.left for each in written),
        set().union(*(each.ends for each in written)),
    )
