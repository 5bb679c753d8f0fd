"""Texts unrelated to the task, as rows that are scored with the base and the tuned model."""

import json
from functools import partial
from pathlib import Path

from stages.shared.bounded import SECONDS, bounded
from stages.shared.rows import IGNORED

# Prefix of the metrics of these texts.
PREFIX = "retention_"
# Longer texts are split, which bounds memory.
MOST_TOKENS_A_ROW = 512
# Far slower than any usable tokenizer.
TOKENS_A_SECOND = 10_000


def retention_rows(folder: Path, tokenizer, most: int, positions: int | None = None) -> list[dict]:
    """Rows (as in rows.py) of the texts in `folder`, until `most` tokens are scored.

    positions  most tokens of a row that the model supports; None for any number

    All tokens are scored but the first of a row and those that the tokenizer adds. Raises
    StageError if the tokenizer exceeds its time or memory: some never end on some texts.
    """
    where = f"{folder}: tokenizing its texts"
    remedy = "name others in retention.id, or set retention: null"
    longest = min(MOST_TOKENS_A_ROW, positions or MOST_TOKENS_A_ROW)
    work = partial(_rows, folder, tokenizer, most, longest)
    return bounded(work, where, remedy, SECONDS + most / TOKENS_A_SECOND)


def _rows(folder: Path, tokenizer, most: int, longest: int) -> list[dict]:
    rows: list[dict] = []
    lines = (folder / "texts.jsonl").read_text(encoding="utf-8").split("\n")
    for text in (json.loads(line) for line in lines if line):
        encoded = tokenizer(text["text"], return_offsets_mapping=True)
        ids, places = encoded["input_ids"], encoded["offset_mapping"]
        for start in range(0, len(ids), longest):
            part = slice(start, min(start + longest, start + most + 1))
            if most > 0 and (row := _row(text, ids[part], places[part])):
                rows.append(row)
                most -= sum(label != IGNORED for label in row["labels"])
    return rows


def _row(text: dict, ids: list[int], places: list[tuple[int, int]]) -> dict | None:
    """One row, or None if no token of it can be scored."""
    # A token without characters is not part of the text.
    scored = [i > 0 and begin < end for i, (begin, end) in enumerate(places)]
    learned = [place for place, is_scored in zip(places, scored, strict=True) if is_scored]
    if not learned:
        return None
    return {
        "row": text["row"],
        "input_ids": ids,
        "labels": [i if s else IGNORED for i, s in zip(ids, scored, strict=True)],
        "prompt_tokens": 0,
        "scored_bytes": len(text["text"][learned[0][0] : learned[-1][1]].encode()),
    }


def forgetting(metrics: dict) -> dict[str, float]:
    """Change of the perplexity of these texts from base to tuned model, in percent."""
    if f"{PREFIX}tuned_perplexity" not in metrics:
        return {}
    before, after = (metrics[f"{PREFIX}{who}_perplexity"] for who in ("base", "tuned"))
    return {f"{PREFIX}perplexity_change_percent": 100 * (after / before - 1)}
