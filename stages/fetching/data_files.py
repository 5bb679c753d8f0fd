"""Which files of a data set are fetched: data files, README and licence."""

import re
from pathlib import Path

from stages.shared.dataset_card import listed_files, matching, read_card
from stages.shared.hub import Repository
from stages.shared.params import Source
from stages.shared.process import StageError
from stages.shared.screen import tell
from stages.shared.sources import Folder, keep_only, write_source

DATA = re.compile(r"\.(jsonl|ndjson|json|csv|tsv|parquet)(\.(gz|zst|bz2|xz))?$", re.IGNORECASE)
ARCHIVE = re.compile(r"\.(zip|7z|rar|tar|tgz|tbz2|txz|tar\.\w+)$", re.IGNORECASE)
# Metadata of the datasets library and of this stage, and hidden files.
METADATA = re.compile(r"(^|/)(dataset_infos?|dataset_dict|state|source)\.json$|(^|/)\.")
ABOUT = re.compile(r"(^README\.md|(^|/)(licen[cs]e|notice)[^/]*)$", re.IGNORECASE)


def data_files(files: dict[str, int], section: Source, wanted: re.Pattern = DATA) -> list[str]:
    """The names of `files` that match `wanted`, without metadata.

    Raises StageError if there are none, or if a local data set contains an archive; archives on
    the Hub are skipped.
    """
    names = [name for name in files if wanted.search(name) and not METADATA.search(name)]
    archives = [name for name in files if ARCHIVE.search(name)]
    if archives and (section.source == "local" or not names):
        raise StageError(
            f"{section.id}: {archives[0]} is an archive; unpack it into data/source "
            f"and set {section.section}.source: local"
        )
    if not names and any(name.endswith(".py") for name in files):
        raise StageError(
            f"{section.id} is built by a script, and no code from a data set is run; the Hub may "
            f"have its rows under {section.section}.revision: refs/convert/parquet"
        )
    if not names:
        raise StageError(
            f"{section.id} has no data files (jsonl, ndjson, json, csv, tsv or parquet, optionally "
            "compressed with gz, zst, bz2 or xz)"
        )
    return names


def of_configuration(names: list[str], card: dict, section: Source) -> list[str]:
    """The files of one configuration as README.md lists them; all files if it lists none.

    All splits are kept, since prepare.eval_file may name a split other than dataset.split.
    """
    listed = listed_files(card, section)
    patterns = [pattern for each in listed.values() for pattern in each]
    chosen = matching(names, patterns) if listed else names
    if not chosen:
        raise StageError(
            f"{section.id}: no file matches {', '.join(patterns)}, as its README.md lists; name "
            f"another configuration in {section.section}.config"
        )
    return chosen


def fetch(source: Repository | Folder, section: Source, out: Path, wanted: re.Pattern) -> list[str]:
    """Copy or download the data files that match `wanted`, README.md and the licence into `out`.

    Returns the names of the data files.
    """
    stage = "fetch_retention" if section.section == "retention" else "fetch_data"
    about = [name for name in source.files if ABOUT.search(name)]
    names = data_files(source.files, section, wanted)
    source.get(about, out)
    if section.source == "hub":
        names = of_configuration(names, read_card(out), section)
    size = sum(source.files[name] for name in names)
    tell(f"{stage}: fetching {len(names)} files of {section.id}, {size / 1e6:.2f} MB")
    others = [name for name in source.files if name not in {*about, *names}]
    if others:
        shown = ", ".join(others[:5]) + ", …" * (len(others) > 5)
        tell(f"{stage}: left out: {shown}")
    source.get(names, out)
    keep_only(out, about + names)
    write_source(out, section, source.commit, source.license, source.sums, source.private)
    return names
