"""Processes untrusted input in a separate process, which is killed if it takes too much.

A template can loop forever, a regular expression can take years, and four lines of YAML can expand
to a terabyte. Not all of them can be stopped within a process: some block the interpreter, and
libraries written in Rust abort the process when memory runs out.
"""

import multiprocessing
import os
import pickle
import resource
import signal
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import TypeVar

from stages.shared.interrupts import end_with_parent
from stages.shared.process import StageError

# CPU time, which a busy machine or Ctrl-Z does not use up.
SECONDS = 20.0
# Wall time may be this many times as long, for example to wait for the Hub.
PATIENCE = 3
# Address space, beyond what the process already has.
BYTES = 8_000_000_000
OUT_OF_TIME = signal.SIGPROF

Result = TypeVar("Result")


def bounded(
    work: Callable[[], Result], where: str, remedy: str, seconds: float | None = None
) -> Result:
    """Run work() in a fork of this process; returns or raises its result, which must pickle.

    Raises StageError, starting with `where` and ending with `remedy`, if it takes more than
    `seconds` of CPU time (None: SECONDS), PATIENCE times that of wall time, or BYTES, or if its
    process dies.
    """
    seconds = SECONDS if seconds is None else seconds
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, work, os.getpid(), seconds))
    process.start()
    there.close()
    try:
        if not here.poll(PATIENCE * seconds):
            raise StageError(f"{where}: took more than {PATIENCE * seconds:g} s; {remedy}")
        answer, error, trace = pickle.loads(here.recv_bytes())
    except EOFError:
        process.join()
        number = -(process.exitcode or 0)
        cause = f"ended its process ({signal.Signals(number).name})" if number > 0 else "failed"
        if number == OUT_OF_TIME:
            cause = f"took more than {seconds:g} s"
        raise StageError(f"{where}: {cause}; {remedy}") from None
    finally:
        process.kill()
        process.join()
        here.close()
    if error is None:
        return answer
    if isinstance(error, MemoryError):
        raise StageError(f"{where}: took more than {BYTES / 1e9:g} GB of memory; {remedy}")
    # The traceback is not pickled.
    error.add_note(trace)
    raise error


def limit_worker(parent: int) -> None:
    """Let this process, a fork of `parent`, end with it and take at most BYTES more memory; hides
    libraries' output on a crash."""
    # Ctrl-C reaches every process of the terminal's group, and the parent ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = size + BYTES if hard == resource.RLIM_INFINITY else min(size + BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def limited(seconds: float):
    """Kill this process with OUT_OF_TIME if the block takes more CPU time; only for workers."""
    signal.signal(OUT_OF_TIME, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _answer(to: Connection, work: Callable[[], Result], parent: int, seconds: float) -> None:
    limit_worker(parent)
    try:
        with limited(seconds):
            answer = pickle.dumps((work(), None, ""))
    except BaseException as error:  # panics of Rust libraries are not derived from Exception
        answer = _pickled(error)
    to.send_bytes(answer)


def _pickled(error: BaseException) -> bytes:
    trace = traceback.format_exc()
    try:
        answer = pickle.dumps((None, error, trace))
        pickle.loads(answer)
        return answer
    except Exception:
        other = RuntimeError(f"{type(error).__name__}: {error}"[:2000])
        return pickle.dumps((None, other, trace))
