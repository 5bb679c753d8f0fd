"""A folder in which `stages.prepare` runs alone, without the pipeline."""

import json
from pathlib import Path

import yaml
from tiny import PARAMS, make_tokenizer

from stages.shared.outputs import write_sums

# What the tests of prepare start from: no groups, small sets, every row that is left.
PREPARE = {"group_by": None, "eval_rows": 2, "train_rows": None, "max_length": 256}


def make_folder(
    folder: Path, files: dict[str, bytes], tokenizer=None, dataset: dict | None = None, **prepare
) -> Path:
    """data/raw with `files`, models/tokenizer (a ChatML one if none is given) and params.yaml."""
    for name, data in files.items():
        path = folder / "data/raw" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (folder / "data/raw/source.json").write_text('{"source": "local"}\n')
    if tokenizer is None:
        make_tokenizer(folder / "models/tokenizer")
    else:
        tokenizer.save_pretrained(folder / "models/tokenizer")
    for made in ("data/raw", "models/tokenizer"):
        write_sums(folder / made)
    params = yaml.safe_load(PARAMS.read_text())
    params["dataset"] |= {"source": "local", "id": "data/source/x", "revision": None}
    params["dataset"] |= dataset or {}
    params["prepare"] |= PREPARE | prepare
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    return folder


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def pairs(count: int, start: int = 0) -> list[dict]:
    """Distinct rows of the format prompt_completion, in ten groups."""
    return [
        {"prompt": f"Question {i}?", "completion": f"answer {i}", "group": f"g{i % 10}"}
        for i in range(start, start + count)
    ]
