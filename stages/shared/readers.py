"""Selects and reads files of rows (JSONL, JSON, CSV, TSV, Parquet; plain or compressed).

A row is a dict of column name to value. Every error is a StageError that names file, line and
remedy. Files are streamed: only one row, or one batch of a Parquet file, is in memory.
"""

import difflib
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from stages.shared.csv_rows import read_csv
from stages.shared.dataset_card import listed_files, matching, read_card
from stages.shared.json_rows import read_json, read_jsonl
from stages.shared.opening import COMPRESSED, check_data
from stages.shared.params import Source
from stages.shared.parquet_rows import read_parquet
from stages.shared.process import StageError

_READERS: dict[str, Callable[[Path], Iterator[tuple[int, dict]]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".parquet": read_parquet,
}
# Names of a split's files, as the datasets library recognizes them.
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# Names of shards, as the library writes them; the part before the numbers is the split.
_SHARD = re.compile(r"(?P<split>\w+)-\d{5}-of-(?P<count>\d{5})")


def files_to_read(
    folder: Path, dataset: Source, eval_file: str | None
) -> tuple[list[str], list[str]]:
    """Names of the files in `folder`: those to split or train on, and those of the held-out set."""
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and kind_of(path) and path != folder / "source.json"
    )
    given = [] if eval_file is None else matching(names, [eval_file])
    if eval_file in names:
        given = [eval_file]
    elif eval_file is not None and not given:
        near = difflib.get_close_matches(eval_file, names, 1, 0) or ["no data file"]
        raise StageError(f"prepare.eval_file: no file {eval_file} in {folder}; there is {near[0]}")
    others = [name for name in names if name not in given]
    chosen = _of_split(folder, others, dataset) if dataset.source == "hub" else others
    if not chosen:
        raise StageError(f"{folder}: no data file; name another source in {dataset.section}.id")
    if dataset.source != "hub":
        _check_together(folder, chosen, dataset)
    return chosen, given


def _check_together(folder: Path, names: list[str], dataset: Source) -> None:
    """Raise StageError for files of several splits, which are probably not meant to be mixed."""
    splits = {name: split_of(name) for name in names}
    aside = [name for name in names if _word_of(name) in ("test", "validation")]
    if aside and len(aside) < len(names):
        other = next(name for name in names if name not in aside)
        shards = [name for name in aside if splits[name] == splits[aside[0]]]
        pattern = _SHARD.sub(r"\g<split>-*", aside[0]) if len(shards) > 1 else "it"
        # A further source of a mix has no evaluation file.
        named = f"name {pattern} in prepare.eval_file, or " if dataset.section == "dataset" else ""
        raise StageError(
            f"{folder}: {aside[0]} is beside {other}; {named}remove "
            f"{'them' if len(shards) > 1 else 'it'} from the folder"
        )
    sharded = {splits[name]: name for name in names if splits[name] and _SHARD.search(name)}
    if len(sharded) > 1:
        first, second, *_ = sharded.values()
        raise StageError(
            f"{folder}: {first} and {second} seem to be two splits; remove one of "
            "them from the folder, or rename them alike to train on both"
        )


def _of_split(folder: Path, names: list[str], dataset: Source) -> list[str]:
    """Those of `names` that belong to dataset.split (null: "train"), by README.md or by name."""
    wanted = dataset.split or "train"
    listed = listed_files(read_card(folder), dataset)
    splits = [split for split in listed if split is not None]
    if splits:
        chosen = matching(names, listed.get(wanted, []))
    else:
        chosen = [name for name in names if split_of(name) == wanted]
        for word in ("train", None) if dataset.split is None and not chosen else ():
            alike = [name for name in names if _word_of(name) == word]
            if len({split_of(name) for name in alike}) == 1:
                chosen = chosen or alike
    if not chosen:
        there = splits or sorted({split_of(name) or name for name in names})
        raise StageError(
            f"{dataset.section}.split: {dataset.id} has no file of split {wanted}; there is "
            f"{', '.join(there)}"
        )
    return chosen


def split_of(name: str) -> str | None:
    """The split in a file's name or folder, as in the datasets library: `test` for
    data/test-00000.parquet, `test_sft` for data/test_sft-00000-of-00002.parquet."""
    word, shard = _word_of(name), _SHARD.search(name)
    if word is None or shard is None or shard["split"] in _SPLIT_WORDS[word]:
        return word
    return shard["split"]


def _word_of(name: str) -> str | None:
    words = re.split(r"[^a-z]+", name.lower())
    return next((s for s, called in _SPLIT_WORDS.items() if set(called) & set(words)), None)


def kind_of(path: Path) -> str | None:
    """The suffix that selects the reader, without compression: `.csv` for `a.csv.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _READERS else None


def read_file(path: Path) -> Iterator[tuple[int, dict]]:
    """(line, row) for every row of `path`; for Parquet the number of the row, from 1.

    Raises StageError for a file without rows, and for the first unreadable row.
    """
    kind = kind_of(path)
    if kind is None:
        known = " ".join(_READERS)
        raise StageError(f"{path}: unknown kind of file; known are {known}, also compressed")
    check_data(path, is_text=kind != ".parquet")
    row = None
    for row in _READERS[kind](path):
        yield row
    if row is None:
        raise StageError(f"{path}: no row in the file; fetch it again or leave it out")
