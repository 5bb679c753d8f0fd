"""Join a training run of another machine with this machine's GPUs.

    python -m tools.join HOST:PORT      as `MACHINES=2 dvc repro` says on the first machine
    python -m tools.join                under a scheduler: MASTER_ADDR, MASTER_PORT and RANK

Waits for the first machine to train, pulls missing data from the DVC remote, checks that commit,
params, code, libraries, rows and weights equal the first machine's, and ends with the training.
The first machine has the results; nothing is kept here.
"""

import argparse
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from stages.shared.outputs import check_sums
from stages.shared.params import load_params
from stages.shared.process import StageError, quiet_libraries, recorded

if __name__ == "__main__":
    # torch would print stack traces while it waits.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    quiet_libraries()
    # Ctrl-C while the libraries load.
    signal.signal(signal.SIGINT, lambda *_: sys.exit("join: interrupted"))

from stages.shared.launch import devices, run_ranks
from stages.shared.ranks import Silent, connect
from stages.shared.screen import on_screen
from stages.training.checkpoints import folder_of
from stages.training.machines import (
    WEIGHTS_AND_ROWS,
    Facts,
    check_same,
    describe,
    join,
    said,
    where,
)
from stages.training.worker import work
from tools.schemas import LOCK, read_yaml


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.join", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("address", nargs="?", metavar="HOST:PORT")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        take_part(parser.parse_args().address)
    except Silent as error:
        print(on_screen(f"join: {error}"), file=sys.stderr, flush=True)
        # A thread of torch still waits for the answer, and could not end with the interpreter.
        os._exit(1)
    except (StageError, ConnectionError) as error:
        sys.exit(on_screen(f"join: {error}"))
    except KeyboardInterrupt:
        sys.exit("join: interrupted")


def take_part(address: str | None) -> None:
    """Take part to the end. Raises StageError, and ConnectionError if the first machine is lost."""
    load_params()
    store = find(*parse(address))
    while (first := said(store, "facts", Facts)) is None:
        time.sleep(0.1)
    pull(store, first)
    check_same(first)
    for folder, stage in zip(WEIGHTS_AND_ROWS, ("prepare", "quantize"), strict=True):
        check_sums(folder, stage)
    found = devices()
    part = join(store, len(found))
    if not part.count:
        print(
            "join: the rows of a step cannot be divided among more GPUs; this machine is not used"
        )
        return
    last = part.first + part.count - 1
    print(f"join: ranks {part.first} to {last} of {part.size} run here", flush=True)
    folder = folder_of(part.key)
    # The folder may be the first machine's own, on a shared disk.
    shared = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    own = found[: part.count]
    run_ranks("train", work, own, store, part.first, part.size, stoppable=True)
    if not shared:
        shutil.rmtree(folder, ignore_errors=True)
    print("join: the training has ended")


def parse(address: str | None) -> tuple[str, int]:
    """Host and port. Raises StageError."""
    if address is None:
        return where()
    name, _, port = address.rpartition(":")
    if not name or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise StageError(f"{address!r} is not HOST:PORT, as the first machine prints it")
    return name, int(port)


def find(name: str, port: int):
    """The first machine's store; waits without limit for something to listen there.

    Raises Silent, a ConnectionError, if it does not answer.
    """
    print(f"join: waiting for a training run at {name}:{port}", flush=True)
    before = None
    while True:
        try:
            return connect(name, port, seconds=5)
        except Silent:
            raise
        except ConnectionError:
            if (reason := why_not(name, port)) != before:
                print(f"join: still waiting: {reason}", flush=True)
            before = reason
            time.sleep(1)


def why_not(name: str, port: int) -> str:
    """Why there is no training run yet at an address."""
    try:
        socket.create_connection((name, port), timeout=5).close()
    except (OSError, UnicodeError) as error:
        return getattr(error, "strerror", None) or str(error)
    return "what answers there is no training run"


def pull(store, first: Facts) -> None:
    """Pull rows and weights that are missing or different from the DVC remote."""
    names = [str(folder) for folder in WEIGHTS_AND_ROWS]
    here = describe(load_params())
    changed = {name for name in here.keys() | first.keys() if here.get(name) != first.get(name)}
    if not changed or not changed <= set(names):
        return
    before = recorded()
    if lock := said(store, "lock", str):
        read_yaml(lock.encode(errors="replace"), LOCK, "the other machine's dvc.lock")
        # It names the results.
        Path("dvc.lock").write_text(lock, encoding="utf-8")
    print(f"join: pulling {' and '.join(names)}", flush=True)
    failed = True
    try:
        done = subprocess.run(
            [sys.executable, "-m", "dvc", "pull", "--quiet", *names],
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        failed = bool(done.returncode)
    finally:
        if failed and before:
            Path("dvc.lock").write_text(before, encoding="utf-8")
        elif failed:
            Path("dvc.lock").unlink(missing_ok=True)
    if failed:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        raise StageError(
            f"{' and '.join(names)} cannot be pulled ({''.join(last)}); push them on the first "
            "machine: dvc push"
        )


if __name__ == "__main__":
    main()
