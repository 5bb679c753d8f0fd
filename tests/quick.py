"""Real stages in processes that start in a second: forked where the libraries are imported.

Only third-party modules (tests/warm.py) are there beforehand. The stage itself, and all of stages/,
is imported by the new process from its own folder, as `python -m stages.NAME` does.
"""

import contextlib
import ctypes
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["warm"])
# One thread: tiny models need no more, and many tests may run side by side.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
# Python's own audit events (sys.audit) that change files, and opening one to write.
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate", "os.chmod"}


class Stage:
    """A running `python -m stages.NAME` in `folder`, with its output in `folder`/NAME.log.

    A name with a dot in it is that of the module, which takes `arguments`.
    kill_at: signal the process, by default to kill it, at that change of a file, counted from 1.
    largest_file: bytes beyond which the system refuses to write, as a full disk does.
    privileged: without it, permissions hold for root too.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        kill_at: int = 0,
        number: int = signal.SIGKILL,
        largest_file: int = 0,
        privileged: bool = True,
        arguments: tuple[str, ...] = (),
        **env: str,
    ):
        self.folder, self.log = folder, folder / f"{name}.log"
        _ensure_running()
        self.process = _processes.Process(
            target=_run,
            args=(name, str(folder), env, kill_at, number, largest_file, privileged, arguments),
        )
        self.process.start()

    def wait(self) -> int:
        """Its exit status, negative for a signal."""
        self.process.join(300)
        return self.process.exitcode

    def kill(self, number: int) -> None:
        """Send a signal; a process that has ended meanwhile does not mind."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def until(self, happened: Callable[[], object]) -> bool:
        """Wait for an event; whether it came before the process ended."""
        while self.process.is_alive():
            if happened():
                return True
            time.sleep(0.002)
        return bool(happened())

    def catches(self, number: int) -> bool:
        """Whether the process has a handler of its own for a signal (proc(5), SigCgt)."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return False
        mask = int(status.partition("SigCgt:")[2].split()[0], 16)
        return bool(mask >> (number - 1) & 1)

    def stopped(self) -> bool:
        """Whether SIGSTOP holds it (proc(5), State)."""
        return "State:\tT" in Path(f"/proc/{self.process.pid}/status").read_text()

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")


def run(name: str, folder: Path, **options) -> Stage:
    """Run a stage to its end, which must be a good one."""
    stage = Stage(name, folder, **options)
    assert stage.wait() == 0, stage.said
    return stage


def sealed(folder: Path, step: int | str = "*") -> list[Path]:
    """The complete checkpoints of `folder`: a seal that was only opened is empty."""
    found = folder.glob(f"checkpoints/*/checkpoint-{step}/SHA256SUMS")
    return [seal.parent for seal in found if seal.stat().st_size]


def changes(name: str, folder: Path, **env: str) -> list[str]:
    """Run a stage to its end and list the changes of files that `kill_at` counts."""
    run(name, folder, kill_at=-1, **env)
    return (folder / "changes.log").read_text().splitlines()


def _ensure_running() -> None:
    """Start the server with ENVIRONMENT, which libraries read when they are imported."""
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    # Where it finds tests/warm.py.
    with contextlib.chdir(Path(__file__).parent):
        multiprocessing.forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)


def _run(
    name: str,
    folder: str,
    env: dict[str, str],
    kill_at: int,
    number: int,
    largest_file: int,
    privileged: bool,
    arguments: tuple[str, ...],
) -> None:
    # As in a terminal: what nohup or a shell's `&` starts ignores them, and all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.chdir(folder)
    os.environ.update(ENVIRONMENT | env)
    if "OMP_NUM_THREADS" in env:
        # torch read the server's when it was imported.
        sys.modules["torch"].set_num_threads(int(env["OMP_NUM_THREADS"]))
    for target, mode in ((sys.stdout, "wb"), (sys.stderr, "ab")):
        with open(f"{name}.log", mode) as file:
            os.dup2(file.fileno(), target.fileno())
    sys.path.insert(0, folder)
    sys.dont_write_bytecode = True
    subprocess.Popen = _Started  # type: ignore[misc]
    if kill_at:
        _watch(folder, kill_at, number)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if not privileged:
        _drop_capabilities()
    sys.argv = [name, *arguments]
    _run_to_the_end(name if "." in name else f"stages.{name}")


def _run_to_the_end(module: str) -> None:
    status = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of libraries must not keep the process.
    os._exit(status)


class _Started(subprocess.Popen):
    """subprocess.Popen, which forks a rank where it is told to start one."""

    def __init__(self, command, *, env=None, stdout=None, stderr=None, **options):
        if command[1:3] != ["-m", "stages.shared.rank"]:
            super().__init__(command, env=env, stdout=stdout, stderr=stderr, **options)
            return
        self.args, self.returncode, self._waitpid_lock = command, None, threading.Lock()
        self.stdin = self.stdout = self.stderr = None
        self._child_created, self._sigint_wait_secs = True, 0.25
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        os.setpgid(0, 0)
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            if callable(signal.getsignal(number)):
                python = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                signal.signal(number, python)
        if stdout == subprocess.DEVNULL:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if stderr:
            os.dup2(stderr.fileno(), 2)
        os.environ.clear()
        os.environ.update(env)
        for module in [m for m in sys.modules if m.split(".")[0] == "stages"]:
            del sys.modules[module]
        sys.argv = ["rank", *command[3:]]
        _run_to_the_end("stages.shared.rank")


def _watch(folder: str, kill_at: int, number: int) -> None:
    """Signal this process at a change of a file in `folder`, or list them all with -1."""
    own = (f"{folder}/changes.log",)
    seen = 0
    listing = open(own[0], "w") if kill_at < 0 else None  # noqa: SIM115 (until the end)

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event == "open":
            path, _, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in CHANGES:
            path = arguments[0]
        else:
            return
        if not isinstance(path, str | os.PathLike | bytes):
            return
        path = os.path.abspath(os.fsdecode(path))
        if not path.startswith(folder + "/") or path in own or "/.dvc/tmp/" in path:
            return
        seen += 1
        if listing:
            listing.write(f"{event} {path.removeprefix(folder + '/')}\n")
            listing.flush()
        elif seen == kill_at:
            os.kill(os.getpid(), number)

    sys.addaudithook(hook)


def _drop_capabilities() -> None:
    """Let permissions of files hold for this process, though it is root's (capset(2))."""
    version_3 = 0x20080522
    header, none = (ctypes.c_uint32 * 2)(version_3, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")
