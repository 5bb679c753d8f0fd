"""Make the raw data content, bytes as they come.

    python -m stages.fetch_data

Reads dataset from params.yaml and data/source, the Hub or an installed package. Writes data/raw:
the files and source.json (where they come from, the commit, the licence, the SHA-256 of each).
"""

import json
from pathlib import Path

from stages.shared.params import Dataset, load_params
from stages.shared.stage import StageError, begin, whole_folder

if __name__ == "__main__":
    begin("fetch_data")

from stages.shared.azure_cli import azure_examples
from stages.shared.hub import license_of, package, write_source

RAW = Path("data/raw")


def from_package(section: Dataset, out: Path) -> None:
    """Write the rows of azure-cli's help examples to examples.jsonl."""
    if section.id != "azure-cli":
        raise StageError(
            f"dataset.id: no data is known in the package {section.id}, only azure-cli"
        )
    found = package(section.id, section.revision)
    rows = azure_examples(Path(found.locate_file("azure/cli/command_modules")))
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (out / "examples.jsonl").write_text("".join(lines), encoding="utf-8")
    write_source(out, section, None, license_of(found))
    print(f"fetch_data: {len(rows)} examples, {len({r['group'] for r in rows})} services")


def main() -> None:
    section = load_params().dataset
    with whole_folder(RAW) as out:
        from_package(section, out)


if __name__ == "__main__":
    main()
