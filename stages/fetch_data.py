"""Fetch the raw data, unchanged.

    python -m stages.fetch_data

Reads dataset from params.yaml, and data/source, the Hub or an installed package. Writes data/raw:
the data files and source.json (source, commit, licence, SHA-256 of each file). With dataset.mix
each source has a folder of its own, the first data/raw/source_0.
"""

import hashlib
import json
import shutil
from pathlib import Path

from stages.shared.outputs import whole_folder
from stages.shared.params import Source, load_params
from stages.shared.process import StageError, begin

if __name__ == "__main__":
    begin("fetch_data")

from stages.fetching.azure_cli import azure_examples
from stages.fetching.chatterbot_corpus import dialogs
from stages.fetching.data_files import DATA, fetch
from stages.shared.hub import Repository
from stages.shared.mix import sources_of
from stages.shared.paths import RAW
from stages.shared.sources import Folder, copy_license, open_source, package, write_source

# Package -> its reader, the folder to read, and a name for the groups.
PACKAGES = {
    "azure-cli": (azure_examples, "azure/cli/command_modules", "services"),
    "chatterbot-corpus": (dialogs, "chatterbot_corpus/data/english", "categories"),
}


def extract(section: Source, out: Path) -> None:
    """Write a package's rows to examples.jsonl."""
    if section.id not in PACKAGES:
        raise StageError(
            f"{section.section}.id: the supported packages are {' and '.join(PACKAGES)}, not "
            f"{section.id}"
        )
    assert section.revision is not None  # Null only for a local folder.
    found, (rows_of, folder, groups) = package(section.id, section.revision), PACKAGES[section.id]
    rows = rows_of(Path(str(found.locate_file(folder))))
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (out / "examples.jsonl").write_text("".join(lines), encoding="utf-8")
    write_source(out, section, None, copy_license(found, out), {})
    print(f"fetch_data: {len(rows)} examples of {len({row['group'] for row in rows})} {groups}")


def resume_key(opened: list[Repository | Folder | None]) -> str | None:
    """The commits of all sources, by which an interrupted download resumes; None without any."""
    commits = [source.commit if source else None for source in opened]
    if len(commits) == 1 or not any(commits):
        return commits[0]
    return hashlib.sha256(repr(commits).encode()).hexdigest()[:40]


def main() -> None:
    sections = sources_of(load_params().dataset)
    opened = [
        None if section.source == "pypi" else open_source(section.section, section)
        for section in sections.values()
    ]
    with whole_folder(RAW, resume_key=resume_key(opened)) as out:
        for (name, section), source in zip(sections.items(), opened, strict=True):
            folder = out / name
            if name and not (source and source.commit):
                # Left by an interrupted download; sources without a commit start over.
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(exist_ok=True)
            if source:
                fetch(source, section, folder, DATA)
            else:
                extract(section, folder)
    size = sum(path.stat().st_size for path in RAW.rglob("*") if path.is_file())
    print(f"fetch_data: {size / 1e6:.2f} MB in {RAW}")


if __name__ == "__main__":
    main()
