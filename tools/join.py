"""Join a training run of another machine with this machine's GPUs.

    python -m tools.join HOST:PORT      as `MACHINES=2 dvc repro` says on the first machine
    python -m tools.join                under a scheduler: MASTER_ADDR, MASTER_PORT and RANK

Waits for the first machine to train, pulls missing data from the DVC remote, checks that commit,
params, code, libraries, rows and weights equal the first machine's, and ends with the training.
The first machine has the results; nothing is kept here.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from stages.shared.launch import devices, run_ranks
from stages.shared.outputs import check_sums
from stages.shared.params import load_params
from stages.shared.process import StageError, quiet_libraries
from stages.shared.ranks import connect, look
from stages.training.checkpoints import folder_of
from stages.training.machines import (
    WEIGHTS_AND_ROWS,
    check_same,
    describe,
    differences,
    join,
    where,
)
from stages.training.worker import work


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.join", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("address", nargs="?", metavar="HOST:PORT")
    try:
        take_part(parser.parse_args().address)
    except (StageError, ConnectionError) as error:
        sys.exit(f"join: {error}")
    except KeyboardInterrupt:
        sys.exit("join: interrupted")


def take_part(address: str | None) -> None:
    """Take part to the end. Raises StageError, and ConnectionError if the first machine is lost."""
    load_params()
    quiet_libraries()
    store = find(*parse(address))
    while look(store, "facts") is None:
        time.sleep(0.1)
    pull(store)
    check_same(store)
    for folder, stage in zip(WEIGHTS_AND_ROWS, ("prepare", "quantize"), strict=True):
        check_sums(folder, stage)
    found = devices()
    part = join(store, len(found))
    if not part["count"]:
        print(
            "join: the rows of a step cannot be divided among more GPUs; this machine is not used"
        )
        return
    last = part["first"] + part["count"] - 1
    print(f"join: ranks {part['first']} to {last} of {part['size']} run here", flush=True)
    folder = folder_of(part["key"])
    # The folder may be the first machine's own, on a shared disk.
    shared = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    own = found[: part["count"]]
    run_ranks("train", work, own, store, part["first"], part["size"], stoppable=True)
    if not shared:
        shutil.rmtree(folder, ignore_errors=True)
    print("join: the training has ended")


def parse(address: str | None) -> tuple[str, int]:
    """Host and port. Raises StageError."""
    if address is None:
        return where()
    name, _, port = address.rpartition(":")
    if not name or not port.isdecimal():
        raise StageError(f"{address!r} is not HOST:PORT, as the first machine prints it")
    return name, int(port)


def find(name: str, port: int):
    """The first machine's store; waits without limit."""
    print(f"join: waiting for a training run at {name}:{port}", flush=True)
    while True:
        try:
            return connect(name, port, seconds=5)
        except ConnectionError:
            time.sleep(1)


def pull(store) -> None:
    """Pull rows and weights that are missing or different from the DVC remote."""
    names = [str(folder) for folder in WEIGHTS_AND_ROWS]
    here, first = describe(load_params()), look(store, "facts")
    same = {name: first[name] for name in first if name not in names}
    if differences(here, same) or not any(here[name] != first[name] for name in names):
        return
    if lock := look(store, "lock"):
        # The first machine's dvc.lock names its results.
        Path("dvc.lock").write_text(lock, encoding="utf-8")
    print(f"join: pulling {' and '.join(names)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "pull", "--quiet", *names],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        raise StageError(
            f"{' and '.join(names)} cannot be pulled ({''.join(last)}); push them on the first "
            "machine: dvc push"
        )


if __name__ == "__main__":
    main()
