"""Watches the ranks of this machine: forwards signals, and ends all as soon as one cannot go on.

A rank that fails, dies or hangs ends all others. The error is that of the rank that caused it, not
of those that only waited for it.
"""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO, Any

from stages.shared.interrupts import ONE_PRESS_SECONDS, SIGNALS, kill_oneself, note_interrupt
from stages.shared.process import StageError
from stages.shared.rank import tell
from stages.shared.ranks import TIMEOUT, look, put

# Seconds after the first failure in which other ranks may report the cause.
CAUSE_SECONDS, AGREED_SECONDS = 3.0, 0.5
# Seconds without a sign of life, sent every second, after which a machine counts as lost.
SILENCE_SECONDS = 10.0
# A key of the store, after a signal that the ranks were to end with.
SIGNALED = "signaled"
# Seconds to exit after rank 0 has returned its result.
PARTING_SECONDS = 15.0


class Ranks:
    """The ranks of this machine, numbered from `first`, of `size` in all.

    others  number of the first rank of each further machine
    """

    def __init__(self, store, first: int, size: int, others: Sequence[int]):
        self.store, self.first, self.size = store, first, size
        now = time.monotonic()
        self.others = dict.fromkeys(others, (0, now))
        self.said_at = now
        self.signaled: tuple[int, float] | None = None
        self.beats, self.beat_at = 0, now
        self.words: list[IO[bytes]] = []
        self.processes: list[subprocess.Popen] = []

    def start(self, command: list[str], environment: dict[str, str]) -> None:
        """Start the next rank."""
        self.words.append(tempfile.TemporaryFile())  # noqa: SIM115 (until __exit__)
        # All output of the first rank is shown; of the others only their last words.
        quiet = {"stdout": subprocess.DEVNULL, "stderr": self.words[-1]}
        streams = quiet if self.first + len(self.processes) else {}
        self.processes.append(
            subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                # Only the stage gets a terminal's Ctrl-C, and forwards it.
                process_group=0,
                **streams,  # type: ignore[call-overload]
            )
        )

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
                if self.signaled:
                    put(self.store, SIGNALED, True)
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
            return Ended(self.signaled[0])
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


class Ended(BaseException):
    """The stage ends as the signal `number` would have ended it."""

    def __init__(self, number: int):
        self.number = number
