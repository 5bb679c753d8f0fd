"""How a stage hears that it should end: with dvc, and at Ctrl-C, whenever that comes.

DVC ignores SIGINT while a stage runs and looks at the stage's exit status alone. A Ctrl-C that
comes when the outputs are in place must neither throw them away nor go unheard: DVC records
them, and the next stage of the same `dvc` refuses to begin, by a note that lies in .dvc/tmp.
"""

import atexit
import ctypes
import faulthandler
import os
import signal
from pathlib import Path
from types import FrameType

NOTE = Path(".dvc/tmp/interrupted")
# In the order in which they are caught: whoever waits for SIGTERM to be may send any.
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
# A signal that comes again sooner is the same press of Ctrl-C, or the same end of dvc.
ONE_PRESS_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1


def hear_interrupts() -> None:
    """Let the first Ctrl-C be a KeyboardInterrupt, or a note after the end; the second one kills.

    nohup and a script's `&` ignore SIGINT on purpose, and it stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
        atexit.register(_hear_to_the_end)


def note_interrupt() -> None:
    """Have the next stage of this `dvc` not begin, since this one has come to its end."""
    NOTE.parent.mkdir(parents=True, exist_ok=True)
    NOTE.write_text(f"{_dvc()}interrupted\n", encoding="utf-8")


def interrupted_before() -> bool:
    """Whether a Ctrl-C came when the stage before, of the same `dvc`, was ending."""
    try:
        said = NOTE.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return False
    return said != _dvc() and said.startswith(_dvc())


def kill_oneself(number: int) -> None:
    """End at once as signal `number` ends a process that knows nothing of it."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def end_with_parent(number: signal.Signals) -> None:
    """Have signal `number` sent to this process when the one that started it ends, as by SIGKILL.

    The parent may have ended before: check that after the call.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def process_ticks(pid: int) -> int:
    """When process `pid` started, in clock ticks since the boot (proc(5), field 22)."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def _interrupt(number: int, frame: FrameType | None) -> None:
    # The rest may take long: a library's threads are waited for. A second one waits for nothing.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    while frame:
        if frame.f_globals.get("__name__") == "__main__" and frame.f_code.co_name == "<module>":
            raise KeyboardInterrupt
        frame = frame.f_back
    note_interrupt()


def _hear_to_the_end() -> None:
    """Note a Ctrl-C also while Python takes itself apart, when no handler of ours would run.

    faulthandler's is the one that does: it writes where the process stands behind what is there.
    """
    if interrupted_before():
        return
    NOTE.parent.mkdir(parents=True, exist_ok=True)
    # A file object would be closed too soon.
    file = os.open(NOTE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.write(file, _dvc().encode())
    # Python puts the system's default back in place of a handler of its own.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.register(signal.SIGINT, file, all_threads=False)


def _dvc() -> str:
    """A line that no two `dvc` share: process numbers are used again."""
    try:
        return f"{os.getppid()} {process_ticks(os.getppid())}\n"
    except OSError:
        return "none\n"
