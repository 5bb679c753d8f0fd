"""Starts ranks: one process for each GPU of this machine.

The stage itself then computes nothing and never uses a GPU; it only watches the ranks
(stages/shared/watching.py). Each rank has the environment that torchrun sets, and sees only its
GPU. Rank 0 prints for all.
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from stages.shared.interrupts import kill_oneself
from stages.shared.ranks import ALONE, host, put, whole_number
from stages.shared.watching import Ended, Ranks

# Variables of schedulers and MPI, which would make accelerate wait for other processes.
FOREIGN = ("PMI", "OMPI_COMM_WORLD", "MV2_COMM_WORLD")
CONTRACT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
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
        store = host()
        put(store, "task", {})
        return run_ranks(stage, function, found, store)
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
    stage: str,
    function: Callable,
    devices: list[str],
    store,
    first: int = 0,
    size: int | None = None,
    others: Sequence[int] = (),
    stoppable: bool = False,
) -> Any:
    """Call the module-level `function` in a rank on each of `devices`; returns rank 0's result.

    It gets the World and the `task` in `store`; task and result must be JSON.

    first, size, others  as of Ranks, if several machines take part
    stoppable            the ranks get SIGHUP, SIGINT and SIGTERM and end by themselves

    Raises StageError with the message of the rank that failed.
    """
    # The stage's own script is __main__ here.
    named = f"{function.__globals__['__spec__'].name}:{function.__name__}"
    command = [sys.executable, "-m", "stages.shared.rank", stage, named]
    size = size or len(devices)
    try:
        with Ranks(store, first, size, others) as ranks:
            for rank, device in enumerate(devices, first):
                ranks.start(command, _environment(rank, size, device, len(devices), store))
            return ranks.watch(stoppable)
    except Ended as ended:
        kill_oneself(ended.number)


def _environment(rank: int, size: int, device: str, local: int, store) -> dict[str, str]:
    """`local`: number of ranks on this machine."""
    found = os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        # Each sees one device.
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": store.host,
        "MASTER_PORT": str(store.port),
        "CUDA_VISIBLE_DEVICES": device,
        "RANKS_PARENT": str(os.getpid()),
    }
    if size == local:
        found.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if not device:
        threads = max(1, len(os.sched_getaffinity(0)) // local)
        found.setdefault("OMP_NUM_THREADS", str(threads))
    return NCCL | found
