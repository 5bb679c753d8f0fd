"""The rows that `prepare` writes and later stages read.

data/prepared has train.arrow, eval.arrow and, depending on params.yaml, group.arrow,
validation.arrow and source_1.arrow and so on, the held-out rows of further sources in dataset.mix
(Arrow IPC streams, memory-mapped without a copy), tokenizer/ (the tokenizer with its final template
and pad token), source.json (provenance) and prepared.json. Columns of a set:

    row            text    file and line, such as `train.jsonl:12`, with several sources including
                           the folder (`source_1/train.jsonl:12`); the second part of a split row is
                           `train.jsonl:12#2`
    input_ids      int32   the rendered row, at most prepare.max_length tokens
    labels         int32   input_ids where learned, -100 elsewhere (not shifted)
    prompt_tokens  int32   leading tokens that are the prompt at inference; 0 for text without one,
                           for a part of a prompt and for later parts of a split row
    scored_bytes   int32   UTF-8 bytes of the learned text
"""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

IGNORED = -100
SCHEMA = pa.schema(
    [
        ("row", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("prompt_tokens", pa.int32()),
        ("scored_bytes", pa.int32()),
    ]
)


def read_rows(path: Path) -> list[dict]:
    """All rows of one set as Python values; for held-out sets, which are small."""
    with pa.memory_map(str(path)) as source:
        return pyarrow.ipc.open_stream(source).read_all().to_pylist()


def token_counts(table: pa.Table) -> list[int]:
    """Tokens of every row."""
    return pc.list_value_length(table["input_ids"]).to_pylist()


def lengths(table: pa.Table) -> tuple[list[int], list[int]]:
    """(tokens, learned tokens) of every row, without a Python object for each token."""
    tokens = token_counts(table)
    row = pc.list_parent_indices(table["labels"])
    # pyarrow imports pandas to convert a Python value such as IGNORED.
    equal = pc.equal(pc.list_flatten(table["labels"]), pc.list_flatten(table["input_ids"]))
    learned = pc.filter(row, equal)
    counts = {c["values"]: c["counts"] for c in pc.value_counts(learned).to_pylist()}
    return tokens, [counts.get(i, 0) for i in range(len(tokens))]


def set_sha256(rows: list[dict]) -> str:
    """Hash of the token ids and labels of all rows, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row["input_ids"], row["labels"])).encode())
    return digest.hexdigest()


def length_batches(rows: list[dict], tokens_per_batch: int) -> list[list[dict]]:
    """Batches of rows of similar length, at most `tokens_per_batch` padded tokens (or one row)."""
    batches: list[list[dict]] = []
    for row in sorted(rows, key=lambda r: -len(r["input_ids"])):
        width = len(batches[-1][0]["input_ids"]) if batches else 0
        if not batches or (len(batches[-1]) + 1) * width > tokens_per_batch:
            batches.append([])
        batches[-1].append(row)
    return batches
