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
from importlib import metadata

from stages.shared.outputs import SUMS
from stages.shared.params import Params, load_params
from stages.shared.paths import PREPARED, QUANTIZED
from stages.shared.process import StageError, code_files, recorded, sha256
from stages.shared.ranks import connect, host, look, put

# torchrun's default.
PORT = 29500
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")
# Inputs that a joining machine may pull from a DVC remote.
WEIGHTS_AND_ROWS = (PREPARED, QUANTIZED)


def how_many() -> int:
    """Number of machines that train together. Raises StageError if this is not the first."""
    if int(os.environ.get("RANK", "0")):
        raise StageError(
            f"RANK is {os.environ['RANK']}: only the process with RANK 0 runs dvc repro; "
            "run python -m tools.join in the others"
        )
    number = os.environ.get("MACHINES") or os.environ.get("WORLD_SIZE") or "1"
    if not number.isdecimal() or not int(number):
        raise StageError(f"MACHINES is {number!r} but must be a number of machines, 1 or more")
    return int(number)


def where() -> tuple[str, int]:
    """Address and port of the first machine."""
    port = int(os.environ.get("MASTER_PORT") or PORT)
    if address := os.environ.get("MASTER_ADDR"):
        return address, port
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Sends nothing: the system only chooses the local address.
            probe.connect(("192.0.2.1", 9))
            return probe.getsockname()[0], port
        except OSError:
            return "127.0.0.1", port


def describe(params: Params) -> dict[str, str]:
    """Name -> short text of everything that decides the result, to compare between machines."""
    trained = json.dumps(params.model_dump(include={"seed", "lora", "train"})).encode()
    code = b"".join(path.read_bytes() for path in code_files("train"))
    facts = {
        "commit": _commit(),
        "params.yaml (seed, lora, train)": hashlib.sha256(trained).hexdigest(),
        "the code of train": hashlib.sha256(code).hexdigest(),
    }
    facts |= {name: metadata.version(name) for name in LIBRARIES}
    for folder in WEIGHTS_AND_ROWS:
        sums = folder / SUMS
        facts[str(folder)] = sha256(sums) if sums.exists() else "missing"
    return facts


def _commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "none"


def differences(here: dict[str, str], first: dict[str, str]) -> list[str]:
    """What differs between the two machines."""
    return [
        f"{name} (here {here.get(name, 'missing')[:12]}, there {value[:12]})"
        for name, value in first.items()
        if here.get(name) != value
    ]


def wait_for(machines: int, facts: dict[str, str]):
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
            if number not in joined and (devices := look(store, f"machine {number}")):
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


def join(store, devices: int) -> dict:
    """Join the run of the first machine; returns first, count, size and key."""
    rank = int(os.environ.get("RANK", "0"))
    number = rank or store.add("numbers", 1)
    put(store, f"machine {number}", devices)
    while (ranks := look(store, f"ranks of {number}")) is None:
        time.sleep(0.1)
    return ranks


def check_same(store) -> None:
    """Raise StageError unless this machine has the same inputs as the first."""
    if wrong := differences(describe(load_params()), look(store, "facts")):
        raise StageError(
            f"the first machine differs in {', '.join(wrong)}; check out the same commit on "
            "both, with the same params.yaml, and on the first machine: dvc push"
        )
