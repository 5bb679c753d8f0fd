"""Writes rows to an Arrow file with worker processes; the bytes do not depend on their number."""

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from tqdm import tqdm

from stages.preparing.encoding import Encoder
from stages.preparing.formats import Example, chat_of
from stages.preparing.messages import Unusable
from stages.preparing.splitting import Store
from stages.shared.bounded import OUT_OF_TIME, limit_worker, limited
from stages.shared.paths import RAW
from stages.shared.process import StageError
from stages.shared.rows import IGNORED, SCHEMA

# Rows per task and per record batch; the bytes of a file depend on it.
CHUNK = 512
# With fewer rows, starting workers takes longer than they save.
_WORTH_WORKERS = 4000
# Chunks in flight for each worker.
_IN_FLIGHT = 3
# Exit codes of workers that a row brought down, in Python or in a library in Rust or C.
_BY_A_ROW = {
    OUT_OF_TIME: "takes too long",
    signal.SIGABRT: "ended the process (SIGABRT)",
    signal.SIGSEGV: "ended the process (SIGSEGV)",
}
# Of one row: a template that never ends would otherwise take as long as the row is long.
_MOST_SECONDS = 600
SHORTER = "divide long conversations, whose time grows with the square of their length"
# Inherited by forked workers.
_job: dict = {}


@dataclass
class Part:
    """Rows made from some candidates, flat. `rows` int32 [R, 6]: index of the candidate, tokens,
    prompt tokens, scored bytes, whether truncated, number of the part from 0. `ids` int32 [T],
    `learned` bool [T]."""

    rows: np.ndarray
    ids: np.ndarray
    learned: np.ndarray
    unusable: list[tuple[int, Unusable]]

    def first(self, count: int) -> "Part":
        """The part up to its row number `count`."""
        if count > len(self.rows):
            return self
        rows = self.rows[:count]
        last, tokens = rows[-1, 0], rows[:, 1].sum()
        return Part(
            rows, self.ids[:tokens], self.learned[:tokens],
            [(place, why) for place, why in self.unusable if place < last],
        )  # fmt: skip

    def ends(self) -> set[int]:
        """Ids of the last tokens of learned runs, except where a row was truncated."""
        # The first token of a row is never learned, so no run continues into the next row.
        last = self.learned & ~np.append(self.learned[1:], False)
        last[np.cumsum(self.rows[:, 1])[self.rows[:, 4] == 1] - 1] = False
        return set(np.unique(self.ids[last]).tolist())


@dataclass
class Written:
    """The content of one file: `rows` as in Part, but with row numbers of the store.

    candidates: how many were processed; left: how many were not needed; ends: ids of the last
    tokens of learned runs.
    """

    rows: np.ndarray
    learned: int
    candidates: int
    left: int
    ends: set[int]

    @property
    def lengths(self) -> np.ndarray:
        return self.rows[:, 1]


def write_set(
    path: Path,
    store: Store,
    encoder: Encoder,
    candidates: np.ndarray,
    limit: int | None,
    drop: Callable[[int, Unusable], None],
) -> Written:
    """Write the first `limit` usable rows of `candidates` (numbers in the store) to `path`.

    drop(row, why) is called for each unusable candidate.
    """
    made, learned, seen, rows = [np.zeros((0, 6), np.int64)], 0, 0, 0
    ends: set[int] = set()
    wanted = len(candidates) if limit is None else min(limit, len(candidates))
    with (
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_stream(sink, SCHEMA) as stream,
        tqdm(total=wanted, desc=path.stem, unit=" rows", disable=None) as bar,
    ):
        for chunk, part in _parts(store, encoder, candidates, wanted):
            if limit is not None:
                part = part.first(limit - rows)
            for place, why in part.unusable:
                drop(chunk[place], why)
            if len(part.rows):
                stream.write_batch(_batch(store, chunk, part))
            made.append(part.rows.astype(np.int64))
            made[-1][:, 0] = chunk[part.rows[:, 0]]
            rows, learned = rows + len(part.rows), learned + int(part.learned.sum())
            ends |= part.ends()
            bar.update(len(part.rows))
            if limit is not None and rows == limit:
                seen += int(part.rows[-1, 0]) + 1
                break
            seen += len(chunk)
    return Written(np.concatenate(made), learned, seen, len(candidates) - seen, ends)


def _parts(
    store: Store, encoder: Encoder, candidates: np.ndarray, wanted: int
) -> Iterator[tuple[np.ndarray, Part]]:
    """Yield (candidates, part) for each chunk, in order."""
    _job.update(store=store, encoder=encoder)
    chunks = [candidates[i : i + CHUNK] for i in range(0, len(candidates), CHUNK)]
    workers = len(os.sched_getaffinity(0)) if wanted >= _WORTH_WORKERS else 1
    yield from zip(chunks, _encode_in_processes(chunks, workers), strict=True)


def _encode_in_processes(chunks: list[np.ndarray], workers: int) -> Iterator[Part]:
    """Yield the part of each chunk, in order, made by `workers` forked processes.

    A process even if it is only one, since a row can make a template or tokenizer run forever, and
    only a process can be killed. Each worker has pipes of its own, so that its death is noticed
    here, even in the middle of a result; a pool would wait on its shared queue forever.
    """
    context = multiprocessing.get_context("fork")
    processes, given = {}, 0
    # Two pipes each: a duplex one would be a socket.
    to: dict[Connection, Connection] = {}
    busy: dict[Connection, deque[int]] = {}
    done: dict[int, Part] = {}
    try:
        for _ in range(workers):
            results, theirs = context.Pipe(duplex=False)
            numbers, to[results] = context.Pipe(duplex=False)
            arguments = (chunks, numbers, theirs, os.getpid())
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            numbers.close()
            theirs.close()
            processes[results], busy[results] = process, deque()
        for wanted in range(len(chunks)):
            # Enough in flight that no worker waits, and few enough to bound memory.
            while given < min(wanted + _IN_FLIGHT * workers, len(chunks)):
                pipe = min(busy, key=lambda each: len(busy[each]))
                # A dead worker is noticed below.
                with contextlib.suppress(BrokenPipeError):
                    to[pipe].send(given)
                busy[pipe].append(given)
                given += 1
            while wanted not in done:
                for ready in wait(list(busy)):
                    pipe = cast(Connection, ready)
                    # Without work, the worker ended by itself.
                    at = busy[pipe].popleft() if busy[pipe] else wanted
                    done[at] = _receive(pipe, processes[pipe], chunks[at])
            yield done.pop(wanted)
    finally:
        for process in processes.values():
            process.kill()
            process.join()


def _receive(
    pipe: Connection, process: multiprocessing.process.BaseProcess, chunk: np.ndarray
) -> Part:
    """A worker's result for `chunk`. Re-raises its exception; StageError if the worker died."""
    try:
        made = pipe.recv()
    except (EOFError, OSError):
        process.join()
        code = process.exitcode or 0
        by = signal.Signals(-code).name if code < 0 else f"status {code}"
        if -code in _BY_A_ROW:
            _name_culprit(chunk, _BY_A_ROW[signal.Signals(-code)])
        raise StageError(
            f"a worker process died ({by}); if memory ran out, close other programs or use one "
            "processor core (taskset -c 0 dvc repro), and run it again"
        ) from None
    if isinstance(made, MemoryError):
        _name_culprit(chunk, "takes too much memory")
    if isinstance(made, BaseException):
        raise made
    return made


def _name_culprit(chunk: np.ndarray, what: str) -> None:
    """Raise StageError naming the row of `chunk` that killed a worker, if it does so again."""
    remedy = "set another prepare.template or, if the tokenizer is to blame, another model"
    if _job["encoder"].loss_on != "completion":
        remedy = f"{SHORTER}, {remedy}"
    first, last = (RAW / _job["store"].where(row) for row in chunk[[0, -1]])
    if len(chunk) == 1:
        raise StageError(f"{first}: rendering and tokenizing it {what}; {remedy}")
    started, most = time.monotonic(), seconds_for(chunk)
    for _ in _encode_in_processes(list(chunk[:, None]), 1):
        if time.monotonic() - started > most:
            raise StageError(
                f"{first} to {last}: rendering and tokenizing them takes too long; {remedy}"
            )


def _work(chunks: list[np.ndarray], numbers: Connection, to: Connection, stage: int) -> None:
    """Encode the chunks whose `numbers` arrive and send them; exit when process `stage` exits."""
    limit_worker(stage)
    while True:
        chunk = chunks[numbers.recv()]
        made: Part | Exception
        try:
            with limited(seconds_for(chunk)):
                made = _encode(chunk)
        except Exception as error:
            # The traceback is not pickled.
            error.add_note(traceback.format_exc())
            made = error
        to.send(made)


def seconds_for(chunk: np.ndarray) -> float:
    """CPU seconds allowed for rendering and tokenizing; the slowest tokenizers do 1 MB/s."""
    store, seconds = _job["store"], 0.0
    if _job["encoder"].loss_on != "completion":
        seconds = seconds_for_turns([store.example(row) for row in chunk])
    return 4 + 0.02 * len(chunk) + store.size(chunk) / 100_000 + seconds


def seconds_for_turns(examples: list[Example]) -> float:
    """CPU seconds allowed in addition if a conversation is rendered up to each of its messages,
    which takes 30 us for each message of each part."""
    chats = filter(None, map(chat_of, examples))
    return sum(min(_MOST_SECONDS, 0.0001 * len(chat.messages) ** 2) for chat in chats)


def _encode(chunk: np.ndarray) -> Part:
    made = _job["encoder"].encode([_job["store"].example(row) for row in chunk])
    unusable = [(place, each) for place, each in enumerate(made) if isinstance(each, Unusable)]
    whole = [(i, row) for i, each in enumerate(made) if isinstance(each, list) for row in each]
    rows = [
        (i, len(row.ids), row.prompt_tokens, row.scored_bytes, row.truncated, row.part)
        for i, row in whole
    ]
    empty = np.zeros(0, np.int32)
    return Part(
        np.array(rows, np.int32).reshape(-1, 6),
        np.concatenate([empty, *(row.ids for _, row in whole)]),
        np.concatenate([empty.astype(bool), *(row.learned for _, row in whole)]),
        unusable,
    )


def _batch(store: Store, chunk: np.ndarray, part: Part) -> pa.RecordBatch:
    places, lengths, prompts, scored, _, numbers = part.rows.T
    names = [
        store.where(chunk[place]) + (f"#{number + 1}" if number else "")
        for place, number in zip(places, numbers, strict=True)
    ]
    ends = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    labels = np.where(part.learned, part.ids, np.int32(IGNORED))
    columns = [
        pa.array(names),
        pa.ListArray.from_arrays(ends, pa.array(part.ids)),
        pa.ListArray.from_arrays(ends, pa.array(labels)),
        pa.array(np.ascontiguousarray(prompts)),
        pa.array(np.ascontiguousarray(scored)),
    ]
    return pa.record_batch(columns, schema=SCHEMA)
