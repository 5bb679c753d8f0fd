"""Ranks: one process for each GPU of this machine, started, watched and ended together.

    python -m stages.shared.launch STAGE MODULE:FUNCTION        (a rank, started by run_ranks)

The stage itself then computes nothing and never uses a GPU. It sends the ranks their task, forwards
signals, and ends all of them as soon as one fails, dies or hangs. Each rank has the environment
that torchrun sets, and sees only its GPU. Rank 0 prints for all.
"""

import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from stages.shared.interrupts import (
    ONE_PRESS_SECONDS,
    SIGNALS,
    end_with_parent,
    kill_oneself,
    note_interrupt,
)
from stages.shared.libraries import load_libraries
from stages.shared.process import StageError, fault_line, quiet_libraries
from stages.shared.ranks import (
    ALONE,
    TIMEOUT,
    World,
    host,
    is_of_waiting,
    look,
    put,
    whole_number,
)

# Variables of schedulers and MPI, which would make accelerate wait for other processes.
FOREIGN = ("PMI", "OMPI_COMM_WORLD", "MV2_COMM_WORLD")
CONTRACT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
# Seconds after the first failure in which other ranks may report the cause.
CAUSE_SECONDS, AGREED_SECONDS = 3.0, 0.5
# Seconds without a sign of life, sent every second, after which a machine counts as lost.
SILENCE_SECONDS = 10.0
# Seconds to exit after rank 0 has returned its result.
PARTING_SECONDS = 15.0
# Sums in the same order on every run; NVLink multicast has a different order.
NCCL = {"NCCL_ALGO": "Ring", "NCCL_PROTO": "Simple", "NCCL_NVLS_ENABLE": "0"}


def devices() -> list[str]:
    """The visible GPUs, by their names for CUDA_VISIBLE_DEVICES.

    Without a GPU there is one device, the CPU, named "". torchrun's LOCAL_RANK selects one.
    """
    count = torch.cuda.device_count()
    if not count:
        # The variable is for tests: several ranks on a CPU are not faster.
        return [""] * int(os.environ.get("CPU_RANKS", "1"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",")[:count] if visible else [str(i) for i in range(count)]
    local = whole_number("LOCAL_RANK", -1, -1, 1000)
    return names if local < 0 else [names[local % count]]


def on_devices(stage: str, function: Callable, most: int) -> Any:
    """The result of `function`, called here or in a rank on each of at most `most` devices."""
    found = devices()[:most]
    if len(found) > 1:
        return run_ranks(stage, function, {}, found)
    see_one(found[0])
    return function(ALONE, {})


def see_one(device: str) -> None:
    """Hide other devices, and a scheduler's variables, from libraries."""
    for name in list(os.environ):
        if name in CONTRACT or name.startswith(FOREIGN):
            del os.environ[name]
    if device:
        os.environ["CUDA_VISIBLE_DEVICES"] = device


def run_ranks(
    stage: str, function: Callable, task: dict, devices: list[str], stoppable: bool = False
) -> Any:
    """Call the module-level `function` in a rank on each of `devices`; returns rank 0's result.

    It gets the World and `task`; task and result must be JSON. Raises StageError with the message
    of the rank that failed. `stoppable` ranks get the signals SIGHUP, SIGINT and SIGTERM and end by
    themselves.
    """
    store = host()
    put(store, "task", task)
    return watched(Ranks(stage, function, devices, store), stoppable)


def watched(ranks: "Ranks", stoppable: bool) -> Any:
    """Rank 0's result, once all of `ranks` have ended. Raises StageError."""
    try:
        with ranks:
            return ranks.watch(stoppable)
    except _Ended as ended:
        kill_oneself(ended.number)


class Ranks:
    """The ranks of this machine, numbered from `first`, of `size` in all.

    others  number of the first rank of each further machine
    """

    def __init__(
        self,
        stage: str,
        function: Callable,
        devices: list[str],
        store,
        first: int = 0,
        size: int | None = None,
        others: list[int] | None = None,
    ):
        self.store, self.first, self.size = store, first, size or len(devices)
        now = time.monotonic()
        self.others = dict.fromkeys(others or [], (0, now))
        self.said_at = now
        self.signaled: tuple[int, float] | None = None
        self.beats, self.beat_at = 0, time.monotonic()
        self.words = [tempfile.TemporaryFile() for _ in devices]  # noqa: SIM115 (until __exit__)
        self.processes: list[subprocess.Popen] = []
        # The stage's own script is __main__ here.
        named = f"{function.__globals__['__spec__'].name}:{function.__name__}"
        command = [sys.executable, "-m", "stages.shared.launch", stage, named]
        for i, device in enumerate(devices):
            # All output of the first rank is shown; of the others only their last words.
            quiet = {"stdout": subprocess.DEVNULL, "stderr": self.words[i]}
            streams = quiet if first + i else {}
            self.processes.append(
                subprocess.Popen(
                    command,
                    env=self._environment(first + i, device, len(devices)),
                    stdin=subprocess.DEVNULL,
                    # Only the stage gets a terminal's Ctrl-C, and forwards it.
                    process_group=0,
                    **streams,  # type: ignore[call-overload]
                )
            )

    def _environment(self, rank: int, device: str, local: int) -> dict[str, str]:
        found = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(self.size),
            # Each sees one device.
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": self.store.host,
            "MASTER_PORT": str(self.store.port),
            "CUDA_VISIBLE_DEVICES": device,
            "RANKS_PARENT": str(os.getpid()),
        }
        if self.size == local:
            found.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if not device:
            threads = max(1, len(os.sched_getaffinity(0)) // local)
            found.setdefault("OMP_NUM_THREADS", str(threads))
        return NCCL | found

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
        for words in self.words:
            words.close()

    def watch(self, stoppable: bool) -> Any:
        """Wait for all ranks; returns the result. Raises StageError if one fails."""
        if stoppable:
            for number in SIGNALS:
                # Ignored signals (nohup, a script's `&`) stay ignored.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, self._hand_on)
        try:
            result = self._wait()
        except BaseException as error:
            if not self.first:
                # Others must read it before the store ends with this process.
                put(self.store, "over", str(error))
                time.sleep(2.0 if self.others else 0.0)
            raise
        if self.signaled:
            # The signal came too late for the ranks, but the next stage must not start.
            note_interrupt()
        return result

    def _wait(self) -> Any:
        given: float | None = None
        while any(process.poll() is None for process in self.processes):
            time.sleep(0.05)
            try:
                self._listen()
                over = look(self.store, "over") if self.first else None
                result = look(self.store, "result")
                failed = self._failed()
            except (ConnectionError, RuntimeError):
                raise StageError("the first machine no longer answers") from None
            if over:
                raise StageError(f"the first machine reports: {over}")
            if result is not None and not failed:
                given = given or time.monotonic()
                if time.monotonic() - given > PARTING_SECONDS:
                    break
            elif failed:
                raise self._cause()
        if given is None and any(process.returncode for process in self.processes):
            raise self._cause()
        return self._part()

    def _part(self) -> Any:
        """The result, once the other machines no longer need the store."""
        if self.first:
            self.store.add(f"ended {self.first}", 1)
            return None
        until = time.monotonic() + PARTING_SECONDS
        while time.monotonic() < until and not self._failed():
            if all(self.store.add(f"ended {other}", 0) for other in self.others):
                break
            time.sleep(0.05)
        return look(self.store, "result")

    def _listen(self) -> None:
        """Check for reports of ranks, and for signs of life of other machines."""
        now = time.monotonic()
        beats = self.store.add("beats", 0)
        if beats != self.beats:
            self.beats, self.beat_at = beats, now
        if self.first and now - self.said_at > 1:
            self.said_at = now
            self.store.add(f"alive {self.first}", 1)
        for other, (count, at) in self.others.items():
            heard = self.store.add(f"alive {other}", 0)
            if heard != count:
                self.others[other] = (heard, now)
            elif now - at > SILENCE_SECONDS:
                raise StageError(
                    f"no sign of life from the machine of rank {other} for {now - at:.0f} s; check "
                    "it, then run it again"
                )

    def _failed(self) -> bool:
        return bool(self.store.add("faults", 0)) or any(p.poll() for p in self.processes)

    def _cause(self) -> BaseException:
        """Why the ranks ended: the error of one that was not just waiting for others."""
        began = time.monotonic()
        while True:
            told = self._told()
            own = [fault for fault in told.values() if not fault["waiting"]]
            dead = self._dead(told)
            passed = time.monotonic() - began
            if passed > AGREED_SECONDS and own:
                first = min(own, key=lambda fault: fault["rank"])
                if first["trace"]:
                    print(first["trace"], end="", file=sys.stderr, flush=True)
                where = f"rank {first['rank']}: " if first["rank"] else ""
                return StageError(where + first["line"])
            if passed > AGREED_SECONDS and dead:
                died = self._death(*dead[0])
                if self.first:
                    fault = {"rank": self.first + dead[0][0], "line": str(died), "trace": ""}
                    tell(self.store, fault | {"waiting": False})
                return died
            if passed > CAUSE_SECONDS:
                break
            time.sleep(0.05)
        silent = [
            str(self.first + i)
            for i, process in enumerate(self.processes)
            if process.poll() is None and self.first + i not in told
        ]
        # Of ranks on other machines only their reports are known.
        local = range(self.first, self.first + len(self.processes))
        silent += [str(i) for i in range(self.size) if i not in local and i not in told]
        if silent:
            return StageError(
                f"rank {', '.join(silent)} has not answered the others for "
                f"{TIMEOUT.total_seconds():g} s; check that GPU and its process, then run it again"
            )
        return StageError(
            f"the ranks lost each other ({next(iter(told.values()))['line'] if told else 'all'}); "
            "check the GPUs and the network between them, then run it again"
        )

    def _told(self) -> dict[int, dict]:
        count = self.store.add("told", 0)
        found = [look(self.store, f"fault {i + 1}") for i in range(count)]
        return {fault["rank"]: fault for fault in found if fault}

    def _dead(self, told: dict[int, dict]) -> list[tuple[int, int]]:
        """(index, status) of ranks that died without a report; NCCL aborts ranks on timeout."""
        waited = time.monotonic() - self.beat_at > 0.9 * TIMEOUT.total_seconds()
        return [
            (i, process.returncode)
            for i, process in enumerate(self.processes)
            if process.poll()
            and self.first + i not in told
            and not (process.returncode == -signal.SIGABRT and waited)
        ]

    def _death(self, place: int, status: int) -> BaseException:
        if self.signaled and status == -self.signaled[0]:
            # The signal came before there was anything to save.
            return _Ended(self.signaled[0])
        rank = self.first + place
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else "ended"
        if status == -signal.SIGKILL:
            how += " (by the system when memory runs out: see dmesg)"
        self.words[place].seek(0)
        lines = self.words[place].read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return StageError(f"rank {rank} {how}{': ' + last if last else ''}; run it again")

    def _hand_on(self, number, frame) -> None:
        now = time.monotonic()
        if self.signaled is None:
            self.signaled = (number, now)
        elif number == signal.SIGINT and now - self.signaled[1] > ONE_PRESS_SECONDS:
            for process in self.processes:
                process.kill()
            kill_oneself(number)
        else:
            return
        if all(process.poll() is not None for process in self.processes):
            note_interrupt()
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)


class _Ended(BaseException):
    """The stage ends as the signal `number` would have ended it."""

    def __init__(self, number: int):
        self.number = number


def main(stage: str, function: str) -> None:
    """Be a rank."""
    end_with_parent(signal.SIGKILL)
    if os.getppid() != int(os.environ["RANKS_PARENT"]):
        return
    quiet_libraries()
    world = World()
    try:
        world = World.of_environment()
        assert world.store  # Only a World alone has none.
        load_libraries("bitsandbytes", "peft")
        module, _, name = function.partition(":")
        call: Callable = getattr(importlib.import_module(module), name)
        result = call(world, look(world.store, "task"))
        if world.first:
            put(world.store, "result", result)
        world.leave()
        status = 0
    except BaseException as error:
        tell_fault(world, stage, error)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of libraries, and of a lost connection, must not keep the process.
    os._exit(status)


def tell_fault(world: World, stage: str, error: BaseException) -> None:
    """Report to the stage what ended this rank."""
    line = fault_line(stage, error)
    waiting = line is None and is_of_waiting(error)
    trace = "" if line or waiting else "".join(traceback.format_exception(error))
    line = line or f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if world.store is None:
        print(trace or line, file=sys.stderr)
        return
    tell(world.store, {"rank": world.rank, "line": line, "trace": trace, "waiting": waiting})


def tell(store, fault: dict) -> None:
    """Add a report for the stages: rank, line, trace ("" for none), waiting."""
    put(store, f"fault {store.add('told', 1)}", fault)
    store.add("faults", 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
