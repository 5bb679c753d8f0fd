"""Computes a test's function in several ranks, or in one process, each forked by tests/quick.py."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import quick
import torch


def in_ranks(size: int, folder: Path, function: Callable, *arguments) -> list[Any]:
    """What `function`(world, *arguments) returned in each of `size` ranks; 1 has no group."""
    from stages.shared.ranks import host

    store = host()
    quick._ensure_running()
    folder.mkdir(parents=True, exist_ok=True)
    processes = [
        quick._processes.Process(
            target=_rank, args=(rank, size, store.port, str(folder), function, arguments)
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    told = [(folder / f"{rank}.log").read_text() for rank in range(size)]
    assert [process.exitcode for process in processes] == [0] * size, "\n".join(told)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _rank(rank: int, size: int, port: int, folder: str, function: Callable, arguments) -> None:
    os.environ.update(quick.ENVIRONMENT)
    with open(f"{folder}/{rank}.log", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    status = 1
    try:
        from stages.shared.ranks import World

        world = World()
        if size > 1:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": "0"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            world = World.of_environment()
        result = function(world, *arguments)
        world.wait()
        torch.save(result, f"{folder}/{rank}.pt")
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
