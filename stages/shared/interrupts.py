"""Ends a stage together with dvc, and on Ctrl-C at any time.

DVC ignores SIGINT while a stage runs and only checks the stage's exit status. A Ctrl-C after the
outputs are complete must neither discard them nor be ignored: DVC records them, and a note in
.dvc/tmp makes the next stage of the same `dvc` refuse to start.
"""

import atexit
import ctypes
import faulthandler
import os
import signal
from pathlib import Path
from types import FrameType

NOTE = Path(".dvc/tmp/interrupted")
# Caught in this order: whoever waits until SIGTERM is caught may then send any of them.
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
# A signal that repeats sooner is the same press of Ctrl-C, or the same end of dvc.
ONE_PRESS_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1


def hear_interrupts() -> None:
    """The first Ctrl-C raises KeyboardInterrupt, or leaves a note at the end; the second kills.

    If SIGINT is ignored (nohup, a script's `&`), it stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
        atexit.register(_hear_to_the_end)


def note_interrupt() -> None:
    """Let the next stage of this `dvc` refuse to start."""
    NOTE.parent.mkdir(parents=True, exist_ok=True)
    NOTE.write_text(f"{_dvc()}interrupted\n", encoding="utf-8")


def interrupted_before() -> bool:
    """Whether there was a Ctrl-C at the end of the previous stage of the same `dvc`."""
    try:
        said = NOTE.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return False
    return said != _dvc() and said.startswith(_dvc())


def kill_oneself(number: int) -> None:
    """End at once by the default action of signal `number`."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def end_with_parent(number: signal.Signals) -> None:
    """Let the system send signal `number` to this process when its parent ends, even by SIGKILL.

    The parent may already have ended: check that after the call.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def process_ticks(pid: int) -> int:
    """When process `pid` started, in clock ticks since the boot (proc(5), field 22)."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def _interrupt(number: int, frame: FrameType | None) -> None:
    # Waiting for a library's threads may take long; a second Ctrl-C does not wait.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    while frame:
        if frame.f_globals.get("__name__") == "__main__" and frame.f_code.co_name == "<module>":
            raise KeyboardInterrupt
        frame = frame.f_back
    note_interrupt()


def _hear_to_the_end() -> None:
    """Note a Ctrl-C even during Python's shutdown, when Python handlers do not run.

    faulthandler's handler does run: it appends a traceback to the file.
    """
    if interrupted_before():
        return
    NOTE.parent.mkdir(parents=True, exist_ok=True)
    # A file object would be closed too early.
    file = os.open(NOTE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.write(file, _dvc().encode())
    # On shutdown Python replaces its own handlers by the system's default.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.register(signal.SIGINT, file, all_threads=False)


def _dvc() -> str:
    """A line that identifies a `dvc` process, since PIDs are reused."""
    try:
        return f"{os.getppid()} {process_ticks(os.getppid())}\n"
    except OSError:
        return "none\n"
