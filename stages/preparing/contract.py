"""The data contract: the fate of every row is counted, and too many dropped rows are an error."""

import math
import os
import sys
from collections import Counter, defaultdict
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from tqdm import tqdm

from stages.preparing.messages import REASONS, Unusable
from stages.preparing.splitting import Store, asked_by
from stages.preparing.writing import Written
from stages.shared.params import Prepare
from stages.shared.process import StageError
from stages.shared.rows import IGNORED
from stages.shared.screen import on_screen, tell
from stages.shared.sets import SET_NAMES

# More dropped rows than this suggest wrong data or parameters.
MOST_DROPPED = 0.5
# Training rows with the prompt of a held-out or validation row, and validation rows with the
# prompt of a held-out row.
MOST_LEAKED = 0
# Rows shown in full for each reason.
_SHOWN = 3
_SHOWN_PLACES = 5


class Drops:
    """Dropped rows: the first of each reason are printed, all are counted."""

    def __init__(self):
        self.seen = 0
        self.counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._places: dict[str, list[str]] = defaultdict(list)

    def add(self, where: str, why: Unusable) -> None:
        self.counts[why.reason] += 1
        line = f"{where}: {why.message}"
        self._first.setdefault(why.reason, line)
        if self.counts[why.reason] <= _SHOWN_PLACES:
            self._places[why.reason].append(where.rpartition("/")[2])
        if self.counts[why.reason] <= _SHOWN:
            # print() would break the progress bar.
            tqdm.write(on_screen(f"prepare: dropped {line}"))

    def check(self) -> None:
        """Raise StageError if too many rows were dropped."""
        dropped = self.counts.total()
        if dropped > MOST_DROPPED * self.seen:
            (reason, count), *_ = self.counts.most_common(1)
            raise StageError(
                f"{dropped} of {self.seen} rows dropped, more than {MOST_DROPPED:.0%}; {count} are "
                f"{reason} ({', '.join(self._places[reason])}{', …' * (count > _SHOWN_PLACES)}), "
                f"the first: {self._first[reason]}"
            )


def packed_bins(lengths: np.ndarray, size: int) -> int:
    """How many sequences of `size` tokens hold rows of these lengths, best fit decreasing.

    trl's algorithm on counts of equal lengths, hence at most O(size^2).
    """
    rows = np.bincount(lengths, minlength=size + 1)
    # room[n]: number of sequences with n tokens left.
    room, bins = np.zeros(size + 1, int), 0
    for length in range(size, 0, -1):
        left = int(rows[length])
        while left and len(fitting := np.flatnonzero(room[length:])):
            space = length + int(fitting[0])
            count = min(left, int(room[space]))
            room[space] -= count
            room[space - length] += count
            left -= count
        full, rest = divmod(left, size // length)
        room[size - size // length * length] += full
        room[size - rest * length] += rest > 0
        bins += full + (rest > 0)
    return bins


def unused_of(sets: dict[str, Written], unused: int, given: bool) -> dict[str, int]:
    """The `unused` rows by reason: beyond train_rows, beyond eval_rows, or in the margin between
    held-out and training rows.

    given: whether the held-out rows came in a file of their own.
    """
    # Without such a file, spare held-out candidates are trained on.
    held_out = sum(
        w.left for name, w in sets.items() if name == "group" or (given and name == "eval")
    )
    beyond = {"train_rows": sets["train"].left, "eval_rows": held_out}
    return {
        "unused_examples": unused,
        **{f"unused_beyond_{limit}_examples": count for limit, count in beyond.items()},
        "unused_margin_examples": unused - sum(beyond.values()),
    }


def metrics_of(
    store: Store,
    sets: dict[str, Written],
    removed: dict[str, np.ndarray],
    drops: list[list[Drops]],
    params: Prepare,
    of: np.ndarray,
) -> dict:
    """metrics/data.json. Rows of the store that are in no set and not dropped are unused.

    removed: metric name -> duplicate rows; drops: of each source, while reading and while
    writing; of: int [N], the source of each row of the store.
    """
    counts = {name: len(rows) for name, rows in removed.items()}
    dropped = sum((each.counts for both in drops for each in both), Counter())
    sources = {name: np.unique(written.rows[:, 0]) for name, written in sets.items()}
    used = sum(map(len, sources.values()))
    judging = [rows for name, rows in sources.items() if name not in ("train", "validation")]
    held_out = np.concatenate(judging)
    validation = sources.get("validation", held_out[:0])
    rows_in = sum(reading.seen for reading, _ in drops)
    metrics: dict[str, float] = {"rows_in": rows_in}
    names = [name for name in SET_NAMES if name in sets or name != "validation"]
    for name in names:
        metrics[f"{name}_examples"] = len(sets[name].rows) if name in sets else 0
    metrics |= counts
    chosen_by = np.concatenate([held_out, validation])
    metrics["leaked_examples"] = len(asked_by(store, sources["train"], chosen_by))
    metrics["leaked_examples"] += len(asked_by(store, validation, held_out))
    metrics["dropped_examples"] = dropped.total()
    metrics |= {f"dropped_{reason}_examples": dropped[reason] for reason in REASONS}
    unused = rows_in - used - sum(counts.values()) - dropped.total()
    metrics |= unused_of(sets, unused, params.eval_file is not None)
    metrics["split_examples"] = sum(len(w.rows) for w in sets.values()) - used
    metrics["truncated_examples"] = sum(int(w.rows[:, 4].sum()) for w in sets.values())
    for name in names:
        metrics[f"{name}_tokens"] = int(sets[name].lengths.sum()) if name in sets else 0
    train = sets["train"]
    tokens = metrics["train_tokens"]
    metrics["train_learned_tokens"] = train.learned
    metrics["learned_token_share_percent"] = 100 * train.learned / tokens
    for share in (50, 90, 99):
        value = np.percentile(train.lengths, share, method="inverted_cdf")
        metrics[f"length_p{share}"] = int(value)
    metrics["length_max"] = int(train.lengths.max())
    packed = packed_bins(train.lengths, params.max_length) * params.max_length
    metrics["packing_efficiency_percent"] = 100 * tokens / packed
    if len(drops) > 1:
        for number, both in enumerate(drops):
            found = source_metrics(number, sets, removed, both, of)
            metrics |= {f"source_{number}_{name}": value for name, value in found.items()}
    return metrics


def source_metrics(
    number: int,
    sets: dict[str, Written],
    removed: dict[str, np.ndarray],
    drops: list[Drops],
    of: np.ndarray,
) -> dict[str, float]:
    """Metrics of one of several sources; arguments as of `metrics_of`."""
    train = sets["train"].rows
    own = train[of[train[:, 0]] == number]
    held_out = sets[f"source_{number}" if number else "eval"]
    rows = np.unique(np.concatenate([written.rows[:, 0] for written in sets.values()]))
    metrics: dict[str, float] = {
        "rows_in": drops[0].seen,
        "train_examples": len(own),
        "eval_examples": len(held_out.rows),
        "train_tokens": int(own[:, 1].sum()),
        "eval_tokens": int(held_out.lengths.sum()),
        "train_share_percent": 100 * len(own) / len(train),
    }
    gone = {name: int((of[each] == number).sum()) for name, each in removed.items()}
    gone["dropped_examples"] = sum(each.counts.total() for each in drops)
    unused = drops[0].seen - int((of[rows] == number).sum()) - sum(gone.values())
    return metrics | gone | {"unused_examples": unused}


def lengths_table(lengths: np.ndarray, size: int) -> str:
    """CSV histogram of rows by length in tokens, in at most 20 bins up to `size`."""
    step = math.ceil(size / 20)
    counts = np.bincount((lengths - 1) // step, minlength=math.ceil(size / step))
    width = len(str(size))
    lines = [
        f"{i * step + 1:0{width}}-{min((i + 1) * step, size):0{width}},{count}"
        for i, count in enumerate(counts)
    ]
    return "\n".join(["tokens,rows", *lines]) + "\n"


def sample_of(path: Path, tokenizer) -> dict:
    """The first row of a set: `row`, and `pieces` as [text, learned]."""
    with pa.OSFile(str(path)) as source, pa.ipc.open_stream(source) as stream:
        row = stream.read_next_batch().slice(0, 1).to_pylist()[0]
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1] != IGNORED)
    pieces = [[tokenizer.decode([token for token, _ in run]), learned] for learned, run in runs]
    return {"row": row["row"], "pieces": pieces}


def show(sample: dict) -> None:
    """Print the sample with learned text in green, or in [[ ]] without colours."""
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    before, after = ("\033[32m", "\033[0m") if coloured else ("[[", "]]")
    shown = [
        ("\n".join(on_screen(line, len(text)) for line in text.split("\n")), learned)
        for text, learned in sample["pieces"]
    ]
    text = "".join(f"{before}{t}{after}" if learned else t for t, learned in shown)
    tell(f"prepare: example row {sample['row']}, learned text marked:")
    # Indented, so that no line of the row looks like one of ours.
    print("  " + text.replace("\n", "\n  "))
