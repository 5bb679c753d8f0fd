"""The outputs of prepare and fetch_*, made directly, to test train without the earlier stages."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
from moe import MOE
from tiny import TEXTS, make_model, make_rows, make_tokenizer, make_workspace

from stages.shared.outputs import write_sums
from stages.shared.process import sha256
from stages.shared.rows import IGNORED, SCHEMA, set_sha256

SOURCE = {"source": "local", "id": "tiny", "revision": None, "commit": None, "files": {}}


def make_prepared_workspace(folder: Path, **sections: dict) -> Path:
    """A workspace of tests/tiny.py in which quantize, or train after it, can start."""
    make_workspace(folder, **sections)
    make_rows(folder / "data/source/rows.jsonl", 72)
    tokenizer = make_tokenizer(folder / "tiny")
    lines = (folder / "data/source/rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    # Longer than the others: the largest step has to be tried first.
    rows[7]["completion"] *= 4
    rows = [_row(tokenizer, i, row) for i, row in enumerate(rows)]
    prepared = folder / "data/prepared"
    prepared.mkdir(parents=True)
    for name, part in {"train": rows[:48], "eval": rows[48:60], "group": rows[60:]}.items():
        with pa.OSFile(str(prepared / f"{name}.arrow"), "wb") as file:
            table = pa.Table.from_pylist(part, schema=SCHEMA)
            with pa.ipc.new_stream(file, SCHEMA) as writer:
                writer.write_table(table)
    tokenizer.save_pretrained(prepared / "tokenizer")
    about = {"max_length": 160, "eval_set_sha256": set_sha256(rows[48:60])}
    (prepared / "prepared.json").write_text(json.dumps(about))
    (prepared / "source.json").write_text(json.dumps(SOURCE))
    write_sums(prepared)
    retention = folder / "data/retention"
    retention.mkdir()
    (retention / "texts.jsonl").write_text(json.dumps({"row": "texts.txt:1", "text": TEXTS}) + "\n")
    write_sums(retention)
    shutil.copytree(folder / "tiny", folder / "models/base")
    files = {"model.safetensors": sha256(folder / "models/base/model.safetensors")}
    (folder / "models/base/source.json").write_text(json.dumps(SOURCE | {"files": files}))
    write_sums(folder / "models/base")
    (folder / "models/plan.ok").write_text("ok")
    return folder


def make_mixture_workspace(folder: Path) -> Path:
    """The same with a mixture, whose experts are trained too."""
    make_prepared_workspace(folder, lora={"experts": True})
    make_model(folder / "models/base", "qwen3_moe", **MOE["qwen3_moe"])
    write_sums(folder / "models/base")
    return folder


def _row(tokenizer, number: int, row: dict) -> dict:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, tokenize=False
    )
    asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
    answer.append(tokenizer.eos_token_id)
    return {
        "row": f"rows.jsonl:{number + 1}",
        "input_ids": asked + answer,
        "labels": [IGNORED] * len(asked) + answer,
        "prompt_tokens": len(asked),
        "scored_bytes": len(row["completion"]),
    }
