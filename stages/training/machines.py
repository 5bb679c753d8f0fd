"""Several machines that train together: the first one waits, the others join by tools/join.py.

The first hosts a store at HOST:PORT. Each of the others puts its number of devices and a
description of its inputs there, and gets the numbers of its ranks. MACHINES gives the number of
machines, or a scheduler sets WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT.
"""

import hashlib
import json
import os
import socket
import subprocess
import time
from typing import Annotated, TypeVar

from pydantic import Field

from stages.shared.foreign import Foreign, held_to
from stages.shared.outputs import SUMS
from stages.shared.params import Params, load_params
from stages.shared.paths import PREPARED, QUANTIZED
from stages.shared.process import StageError, code_files, recorded, sha256
from stages.shared.provenance import version_of
from stages.shared.ranks import connect, host, look, put, whole_number
from stages.training.checkpoints import LIBRARIES

# torchrun's default.
PORT = 29500
MOST_RANKS = 100_000
T = TypeVar("T")
Facts = dict[str, str]
Devices = Annotated[int, Field(ge=1, le=MOST_RANKS)]
# Inputs that a joining machine may pull from a DVC remote.
WEIGHTS_AND_ROWS = (PREPARED, QUANTIZED)


class Part(Foreign):
    """A machine's ranks: `count` from `first` on, of `size`; `key` of the run, a file name."""

    first: Annotated[int, Field(ge=0, le=MOST_RANKS)]
    count: Annotated[int, Field(ge=0, le=MOST_RANKS)]
    size: Annotated[int, Field(ge=1, le=MOST_RANKS)]
    key: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


def how_many() -> int:
    """Number of machines that train together. Raises StageError if this is not the first."""
    if whole_number("RANK", 0, 0, MOST_RANKS):
        raise StageError(
            f"RANK is {os.environ['RANK']}: only the process with RANK 0 runs dvc repro; "
            "run python -m tools.join in the others"
        )
    variable = "MACHINES" if os.environ.get("MACHINES") else "WORLD_SIZE"
    return whole_number(variable, 1, 1, MOST_RANKS)


def where() -> tuple[str, int]:
    """Address and port of the first machine."""
    port = whole_number("MASTER_PORT", PORT, 1, 65535)
    if address := os.environ.get("MASTER_ADDR"):
        return address, port
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Sends nothing: the system only chooses the local address.
            probe.connect(("192.0.2.1", 9))
            return probe.getsockname()[0], port
        except OSError:
            return "127.0.0.1", port


def said(store, key: str, schema: type[T]) -> T | None:
    """What another machine put into `store` as `key`; None if nothing yet. Raises StageError."""
    try:
        value = look(store, key)
    except (ValueError, RecursionError):
        raise StageError(f"the other machine's {key}: not JSON") from None
    return None if value is None else held_to(schema, value, f"the other machine's {key}")


def describe(params: Params) -> Facts:
    """Name -> short text of everything that decides the result, to compare between machines."""
    trained = json.dumps(params.model_dump(include={"seed", "lora", "train"})).encode()
    code = b"".join(path.read_bytes() for path in code_files("train"))
    facts = {
        "commit": _commit(),
        "params.yaml (seed, lora, train)": hashlib.sha256(trained).hexdigest(),
        "the code of train": hashlib.sha256(code).hexdigest(),
    }
    facts |= {name: version_of(name) for name in LIBRARIES}
    for folder in WEIGHTS_AND_ROWS:
        sums = folder / SUMS
        facts[str(folder)] = sha256(sums) if sums.exists() else "missing"
    return facts


def _commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "none"


def differences(here: Facts, first: Facts) -> list[str]:
    """What differs between the two machines."""
    return [
        f"{name} (here {here.get(name, 'missing')[:12]}, there {value[:12]})"
        for name, value in (dict.fromkeys(here, "missing") | first).items()
        if here.get(name) != value
    ]


def wait_for(machines: int, facts: Facts):
    """The store, and the devices of the `machines` - 1 others by their number, once all are here.

    Raises StageError where the port is taken.
    """
    address, port = where()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun itself hosts one there.
        store = connect(address, port)
    else:
        try:
            store = host(address, port, everywhere=True)
        except OSError as error:
            raise StageError(
                f"port {port} cannot be used ({error}); set MASTER_PORT to another"
            ) from None
    put(store, "lock", recorded())
    put(store, "facts", facts)
    print(
        f"train: waiting for {machines - 1} more of {machines} machines: "
        f"python -m tools.join {address}:{port}",
        flush=True,
    )
    joined: dict[int, int] = {}
    while len(joined) < machines - 1:
        time.sleep(0.1)
        for number in range(1, max(machines, store.add("numbers", 0) + 1)):
            if number not in joined and (devices := said(store, f"machine {number}", Devices)):
                joined[number] = devices
    return store, joined


def assign(store, joined: dict[int, int], own: int, size: int, key: str) -> list[int]:
    """Assign ranks, `size` in all, to the machines; returns the first rank of each.

    A machine that is not needed gets none.
    """
    first, firsts = own, []
    for number, devices in sorted(joined.items()):
        count = min(devices, size - first)
        put(store, f"ranks of {number}", {"first": first, "count": count, "size": size, "key": key})
        if count:
            firsts.append(first)
        first += count
    return firsts


def join(store, devices: int) -> Part:
    """Join the run of the first machine; returns this machine's part in it."""
    rank = whole_number("RANK", 0, 0, MOST_RANKS)
    number = rank or store.add("numbers", 1)
    put(store, f"machine {number}", devices)
    while (part := said(store, f"ranks of {number}", Part)) is None:
        time.sleep(0.1)
    return part


def check_same(first: Facts) -> None:
    """Raise StageError unless this machine has the same inputs as the first."""
    if wrong := differences(describe(load_params()), first):
        raise StageError(
            f"the first machine differs in {', '.join(wrong)}; check out the same commit on "
            "both, with the same params.yaml, and on the first machine: dvc push"
        )
