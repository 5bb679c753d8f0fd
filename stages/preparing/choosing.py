"""Chooses the rows of each set, and writes the sets."""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from stages.preparing.contract import MOST_LEAKED, Drops
from stages.preparing.encoding import Encoder
from stages.preparing.messages import Unusable
from stages.preparing.mixing import write_mixed
from stages.preparing.scanning import Scanned, owners
from stages.preparing.splitting import (
    Pools,
    Store,
    after_held_out,
    asked_before,
    asked_by,
    distinct,
    may_be_held_out,
    near_duplicates,
)
from stages.preparing.writing import Written, write_set
from stages.shared.params import Prepare
from stages.shared.paths import RAW
from stages.shared.process import StageError


def remove_duplicates(
    store: Store, held: np.ndarray, of: np.ndarray, params: Prepare
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """(rows to split or train on, rows of the evaluation file, removed rows by reason).

    held: bool [N], whether a row is in the evaluation file; of: int [N], the number of its source.
    """
    rows, given = distinct(store, np.flatnonzero(~held)), distinct(store, np.flatnonzero(held))
    every = np.arange(len(store))
    removed = {"duplicate_examples": np.setdiff1d(every, np.concatenate([rows, given]))}
    if of.any():
        removed["asked_before_examples"] = asked_before(store, rows, given, of)
        rows = np.setdiff1d(rows, removed["asked_before_examples"])
    near = rows[:0]
    if params.near_duplicates:
        # Of two near duplicates the later is removed, so rows of the evaluation file come first.
        both = np.concatenate([given, rows])
        near = near_duplicates(store, tqdm(both, "near duplicates", unit=" rows", disable=None))
    removed["near_duplicate_examples"] = near
    rows, given = np.setdiff1d(rows, near), np.setdiff1d(given, near)
    if len(shared := asked_by(store, rows, given)) > MOST_LEAKED:
        raise StageError(
            f"{RAW / store.where(shared[0])}: has the same prompt as a row of {params.eval_file}, "
            f"as do {len(shared) - 1} others; delete them from one of the two"
        )
    return rows, given, removed


def write_sets(
    store: Store,
    pools: Pools,
    others: list[np.ndarray],
    parts: list[Scanned],
    encoder: Encoder,
    params: Prepare,
    out: Path,
) -> tuple[dict[str, Written], list[Drops]]:
    """Write group.arrow, eval.arrow, validation.arrow, source_1.arrow, … and train.arrow; returns
    them by name, and the rows dropped of each source.

    Each has the first usable rows of its pool. Only validation.arrow has the last ones, so that it
    does not change what is held out. `others` are the pools of further sources, in hash order.
    """
    of = owners(store, parts)
    drops = [Drops() for _ in parts]

    def drop(row: int, why: Unusable) -> None:
        if why.reason == "too_long" and params.too_long == "error":
            raise StageError(f"{RAW / store.where(row)}: {why.message}")
        drops[of[row]].add(f"{RAW / store.where(row)}", why)

    def write(name: str, pool: np.ndarray, limit: int | None) -> Written:
        written = write_set(out / f"{name}.arrow", store, encoder, pool, limit, drop)
        number = of[pool[0]] if len(pool) else 0
        drops[number].seen += written.candidates
        drops[number].check()
        return written

    def filled(name: str, pool: np.ndarray, limit: int | None) -> Written:
        written = write(name, pool, limit)
        if not len(written.rows):
            asked = len(np.unique(store.prompts))
            raise StageError(
                f"no row is left for the {name} set; add rows: these {len(store)} have only "
                f"{asked} different prompts, and rows with the same prompt stay in one set"
            )
        return written

    sets: dict[str, Written] = {}
    if params.group_by:
        sets["group"] = filled("group", pools.group, params.eval_rows)
    sets["eval"] = filled("eval", pools.eval, params.eval_rows)
    seen = 0 if params.eval_file else sets["eval"].candidates
    rest = after_held_out(store, pools.train, seen)
    if params.validation_rows:
        last = rest[::-1]
        sets["validation"] = filled("validation", may_be_held_out(last), params.validation_rows)
        rest = after_held_out(store, last, sets["validation"].candidates)[::-1]
    to_train = [rest]
    for number, order in enumerate(others, 1):
        held = write(f"source_{number}", may_be_held_out(order), params.eval_rows)
        if not len(held.rows):
            raise StageError(
                f"{parts[number].label}: no row is left to hold out, of {len(order)} that no other "
                "source has; add rows, or remove the source from dataset.mix"
            )
        sets[f"source_{number}"] = held
        to_train.append(after_held_out(store, order, held.candidates))
    if others:
        sets["train"] = write_mixed(out, to_train, parts, params.train_rows, write)
    else:
        sets["train"] = filled("train", to_train[0], params.train_rows)
    return sets, drops
