"""Texts that the task has nothing to do with, as rows that can be scored before and after."""

import json
from functools import partial
from pathlib import Path

from stages.shared.bounded import SECONDS, bounded
from stages.shared.rows import IGNORED

# What the metrics of these texts begin with.
PREFIX = "retention_"
# Longer texts are cut: memory and time of a row grow with it.
MOST_TOKENS_A_ROW = 512
# Far fewer than any tokenizer makes.
TOKENS_A_SECOND = 10_000


def retention_rows(folder: Path, tokenizer, most: int) -> list[dict]:
    """Rows as in rows.py of the texts in `folder`, until `most` tokens are scored.

    Everything is scored but the first token of a row and what a tokenizer adds of its own. Raises
    StageError for a tokenizer that takes too much: some loop on some texts.
    """
    where = f"{folder}: tokenizing its texts"
    remedy = "name others in retention.id, or set retention: null"
    work = partial(_rows, folder, tokenizer, most)
    return bounded(work, where, remedy, SECONDS + most / TOKENS_A_SECOND)


def _rows(folder: Path, tokenizer, most: int) -> list[dict]:
    rows: list[dict] = []
    lines = (folder / "texts.jsonl").read_text(encoding="utf-8").split("\n")
    for text in (json.loads(line) for line in lines if line):
        encoded = tokenizer(text["text"], return_offsets_mapping=True)
        ids, places = encoded["input_ids"], encoded["offset_mapping"]
        for start in range(0, len(ids), MOST_TOKENS_A_ROW):
            part = slice(start, min(start + MOST_TOKENS_A_ROW, start + most + 1))
            if most > 0 and (row := _row(text, ids[part], places[part])):
                rows.append(row)
                most -= sum(label != IGNORED for label in row["labels"])
    return rows


def _row(text: dict, ids: list[int], places: list[tuple[int, int]]) -> dict | None:
    """One row, or None where nothing of it can be scored."""
    # A token that stands for no characters is not of the text.
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
    """How much more the tuned model is surprised by these texts than the base, in percent."""
    if f"{PREFIX}tuned_perplexity" not in metrics:
        return {}
    before, after = (metrics[f"{PREFIX}{who}_perplexity"] for who in ("base", "tuned"))
    return {f"{PREFIX}perplexity_change_percent": 100 * (after / before - 1)}
