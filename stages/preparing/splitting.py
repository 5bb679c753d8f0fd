"""Splits rows into sets by hashes alone, so that a million rows fit in 50 MB.

Rows are ordered by a hash of their prompt. The first are held out, the last are trained on, and
between them is a margin, half the size of the held-out set, that is in no set. Rows added later
push others back; the margin keeps rows that were held out from being trained on until the data
has grown by about half. Validation rows are the very last, with a margin of their own, so that the
held-out set is the same with and without them.
"""

import contextlib
import hashlib
import json
import math
import os
import tempfile
import unicodedata
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.preparing.formats import Example, chat_of, text_and_answers
from stages.shared.params import Prepare
from stages.shared.process import StageError

# Held-out rows plus margin, as a multiple of the held-out rows.
_MARGIN = 1.5
# Groups are held out until they have this many times the wanted rows ...
_SPARE = 1.25
# ... and are this share of all groups, so that not just one or two large groups are scored.
_GROUP_SHARE = 0.1
# Held-out rows plus margin are at most this share of all rows.
_MOST_HELD_OUT = 0.5
# Rows with a higher estimated Jaccard similarity of their word trigrams count as duplicates.
NEAR_DUPLICATE = 0.7
_PERMUTATIONS = 128


def prompt_and_rest(example: Example) -> tuple[str, str]:
    """The first prompt, by which a row is split, and the rest of the row, both normalized."""
    chat = chat_of(example)
    if chat is None:
        text, answers = text_and_answers(example)
        start = answers[0][0] if answers else len(text)
        return normal(text[:start]), normal(text[start:])
    messages = chat.messages
    first = next((i for i, m in enumerate(messages) if m["role"] == "user"), 0)
    rest: list = [
        m | {"content": normal(m["content"])} if len(m) > 2 else normal(m["content"])
        for i, m in enumerate(messages)
        if i != first
    ]
    return normal(messages[first]["content"]), json.dumps(rest)


def text_of(example: Example) -> str:
    """The text that is compared for near duplicates, template arguments included."""
    chat = chat_of(example)
    if chat is None:
        return text_and_answers(example)[0]
    beside = [chat.given] * bool(chat.given)
    beside += [{k: m[k] for k in m if k != "content"} for m in chat.messages if len(m) > 2]
    contents = [message["content"] for message in chat.messages]
    return "\n".join(contents + [json.dumps(each) for each in beside])


def normal(text: str) -> str:
    """The text in lower case and NFC, with runs of white space collapsed."""
    # NFC first: the result for text in NFC, by which rows are split, stays as it was.
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def hash64(text: str) -> int:
    """64 bits of BLAKE2b: a million rows collide with a chance of 3e-8."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class Store:
    """Examples on disk, in an unnamed file that vanishes with the process, and 48 bytes of each in
    memory: the columns below, uint64 [N] and uint32 [N].

    `prompts` and `wholes` are hashes of normalized text, which decide the split; `exacts` are
    hashes of what the model sees.
    """

    prompts: np.ndarray
    wholes: np.ndarray
    exacts: np.ndarray
    groups: np.ndarray
    files: np.ndarray
    lines: np.ndarray

    def __init__(self, folder: Path):
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._ends = array("Q", [0])
        self._columns = {name: array("Q") for name in ("prompts", "wholes", "exacts", "groups")}
        self._columns |= {"files": array("I"), "lines": array("I")}
        self._group_keys: dict[str, int] = {}
        self.paths: list[str] = []

    def __del__(self):
        # A full disk has already been reported on writing.
        with contextlib.suppress(OSError):
            self._file.close()

    def add(self, path: str, line: int, example: Example, group: str) -> None:
        prompt, rest = prompt_and_rest(example)
        key = hash64(prompt)
        if not self.paths or self.paths[-1] != path:
            self.paths.append(path)
        text = json.dumps(example)
        self._ends.append(self._ends[-1] + self._file.write(text.encode()))
        if group not in self._group_keys:
            self._group_keys[group] = hash64(group)
        whole, groups = hash64(f"{key} {rest}"), self._group_keys[group]
        values = (key, whole, hash64(text), groups, len(self.paths) - 1, line)
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)

    def finish(self) -> None:
        self._file.flush()
        for name, column in self._columns.items():
            setattr(self, name, np.asarray(column))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def example(self, row: int) -> Example:
        """Safe in forked workers: reads at an offset, without the shared file position."""
        start, end = self._ends[row], self._ends[row + 1]
        return json.loads(os.pread(self._file.fileno(), end - start, start))

    def size(self, rows: np.ndarray) -> int:
        """Total bytes of the rows."""
        return sum(self._ends[row + 1] - self._ends[row] for row in rows)

    def in_files(self, names: list[str]) -> np.ndarray:
        """bool [N]: the rows from the files `names`."""
        wanted = set(names)
        return np.isin(self.files, [i for i, path in enumerate(self.paths) if path in wanted])

    def where(self, row: int) -> str:
        return f"{self.paths[self.files[row]]}:{self.lines[row]}"


def hash_order(store: Store, rows: np.ndarray) -> np.ndarray:
    """`rows` sorted by the hash of the prompt, then of the whole row."""
    return rows[np.lexsort((store.exacts[rows], store.wholes[rows], store.prompts[rows]))]


def distinct(store: Store, rows: np.ndarray) -> np.ndarray:
    """`rows` without exact duplicates."""
    _, first = np.unique(store.exacts[rows], return_index=True)
    return rows[np.sort(first)]


def near_duplicates(store: Store, rows: Iterable[int]) -> np.ndarray:
    """Those of `rows` that nearly duplicate an earlier one: MinHash over word trigrams."""
    # Imported here since it is slow and rarely used.
    from datasketch import MinHash, MinHashLSH

    index, near = MinHashLSH(threshold=NEAR_DUPLICATE, num_perm=_PERMUTATIONS), []
    for row in rows:
        words = normal(text_of(store.example(row))).split()
        runs = {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}
        sketch = MinHash(num_perm=_PERMUTATIONS, seed=1)
        sketch.update_batch([run.encode() for run in runs])
        if index.query(sketch):
            near.append(row)
        else:
            index.insert(row, sketch, check_duplication=False)
    return np.array(near, int)


@dataclass(frozen=True)
class Pools:
    """Row numbers in hash order; each set takes the first usable ones of its pool."""

    train: np.ndarray
    eval: np.ndarray
    group: np.ndarray


def make_pools(store: Store, rows: np.ndarray, given: np.ndarray, params: Prepare) -> Pools:
    """The pools of `rows`; `given` are the rows of the evaluation file, or none.

    Without such a file the pools `train` and `eval` start with the same rows: see after_held_out.
    Raises StageError if no group can be held out.
    """
    group = rows[:0]
    if params.group_by:
        scored, spare = held_out_groups(store, rows, params.eval_rows)
        group = rows[np.isin(store.groups[rows], scored)]
        rows = rows[~np.isin(store.groups[rows], np.concatenate([scored, spare]))]
        group = np.setdiff1d(group, asked_by(store, group, rows))
    train = hash_order(store, rows)
    held_out = hash_order(store, given) if params.eval_file else may_be_held_out(train)
    return Pools(train, held_out, in_turn(store, hash_order(store, group)))


def may_be_held_out(order: np.ndarray) -> np.ndarray:
    """The candidates to hold out, of rows in hash order, so that enough are left to train on."""
    return order[: int(_MOST_HELD_OUT * len(order) / _MARGIN)]


def after_held_out(store: Store, order: np.ndarray, held_out: int) -> np.ndarray:
    """The rows of `order` to train on when its first `held_out` are the held-out set."""
    start = math.ceil(_MARGIN * held_out)
    # Rows with the same prompt stay on one side.
    while 0 < start < len(order) and (
        store.prompts[order[start]] == store.prompts[order[start - 1]]
    ):
        start += 1
    return order[start:]


def in_turn(store: Store, rows: np.ndarray) -> np.ndarray:
    """The rows, taken from the groups in turn, so that no large group fills the set."""
    by_group = np.argsort(store.groups[rows], kind="stable")
    _, first, sizes = np.unique(store.groups[rows][by_group], return_index=True, return_counts=True)
    turn = np.empty(len(rows), int)
    turn[by_group] = np.arange(len(rows)) - np.repeat(first, sizes)
    return rows[np.argsort(turn, kind="stable")]


def held_out_groups(store: Store, rows: np.ndarray, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """(groups to score, groups in the margin): whole groups, in hash order.

    At least a tenth of the groups is scored, and enough for a quarter more than `wanted` rows,
    since some may be too long. The margin is half as many again. A group that would take both
    beyond half of all rows stays in training.
    """
    groups, sizes = np.unique(store.groups[rows], return_counts=True)
    scored: list[np.uint64] = []
    spare: list[np.uint64] = []
    total, enough = 0, _SPARE * wanted
    for group, size in zip(groups, sizes, strict=True):
        if total + size > _MOST_HELD_OUT * len(rows):
            continue
        if total < enough or len(scored) < _GROUP_SHARE * len(groups):
            scored.append(group)
            enough = max(enough, total + size)
        elif total < _MARGIN * enough:
            spare.append(group)
        else:
            break
        total += size
    if not scored:
        raise StageError(
            f"prepare.group_by: none of the {len(groups)} groups is small enough to hold out; "
            "name another column, or set it to null"
        )
    return np.array(scored, np.uint64), np.array(spare, np.uint64)


def asked_before(store: Store, rows: np.ndarray, given: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Those of `rows` that have the prompt of a row of an earlier source or of `given`.

    of: int [N], the source of each row. A prompt belongs to the first source that has it, so that
    what one source holds out is not trained on through another.
    """
    found = [rows[:0]]
    for number in range(1, of[rows].max(initial=0) + 1):
        earlier = np.concatenate([given, rows[of[rows] < number]])
        found.append(asked_by(store, rows[of[rows] == number], earlier))
    return np.concatenate(found)


def asked_by(store: Store, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Those of `rows` that have the prompt of one of `others`."""
    return rows[np.isin(store.prompts[rows], store.prompts[others])]
