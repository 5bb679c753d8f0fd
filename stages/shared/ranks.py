"""Several processes that compute one result together. No other file imports torch.distributed.

A rank is one process with one GPU, or in tests with a share of the CPU. Who starts ranks, and ends
them, is launch.py; the environment that each finds is that of torchrun.
"""

import json
import os
import socket
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# How long a rank waits for the others. The variable exists for tests of ranks that hang.
TIMEOUT = timedelta(seconds=float(os.environ.get("RANKS_TIMEOUT", "300")))
# The messages of gloo's errors, which are plain RuntimeErrors, and of NCCL's.
_OF_WAITING = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")


class World:
    """The ranks of one computation, of which this process is number `rank` of `size`.

    A process alone is a World of one, whose methods do nothing: what it gathers is its own. What
    is told between ranks goes over the CPU (gloo) and never waits for a GPU; gradients go by NCCL.
    Every rank makes the same calls in the same order.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: dist.Store | None = None):
        self.rank, self.size, self.store = rank, size, store

    @classmethod
    def of_environment(cls) -> "World":
        """Join the ranks that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT name."""
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = connect(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.device_count() else "gloo"
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("ranks", store),
            rank=rank,
            world_size=size,
            timeout=TIMEOUT,
        )
        return cls(rank, size, store)

    @property
    def first(self) -> bool:
        """Whether this rank prints and writes for all."""
        return self.rank == 0

    def gather(self, value: Any) -> list:
        """`value` of every rank, by rank."""
        if self.size == 1:
            return [value]
        found: list = [None] * self.size
        dist.all_gather_object(found, value)
        if self.store and self.first:
            self.store.add("beats", 1)
        return found

    def same(self, value: Any) -> Any:
        """`value` of rank 0."""
        if self.size == 1:
            return value
        found = [value]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def wait(self) -> None:
        """Go on when all ranks have come here."""
        self.gather(None)

    def equalize(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give `tensors`, of one shape everywhere, the values of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def leave(self) -> None:
        """Part from the others in peace, at the end."""
        if self.size > 1:
            dist.destroy_process_group()


ALONE = World()


def is_of_waiting(error: BaseException) -> bool:
    """Whether a rank failed because others did not answer: the cause is elsewhere."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OF_WAITING)


def host(address: str = "127.0.0.1", port: int = 0, everywhere: bool = False) -> dist.TCPStore:
    """What ranks and machines tell each other by, served by this process at `address`.

    Port 0 takes a free one. With `everywhere` any address of this machine will do, since others
    may know it by another. Raises OSError where the port is taken.
    """
    listening = socket.create_server(("" if everywhere else address, port))
    # The store closes it.
    number, port = listening.fileno(), listening.getsockname()[1]
    listening.detach()
    return dist.TCPStore(
        address, port, is_master=True, wait_for_workers=False, master_listen_fd=number
    )


def connect(address: str, port: int, seconds: float = 60) -> dist.TCPStore:
    """The store that another process hosts. Raises ConnectionError when it is not there."""
    wait = timedelta(seconds=seconds)
    try:
        return dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=wait)
    except dist.DistError as error:
        raise ConnectionError(str(error).splitlines()[0]) from None


def put(store: dist.Store, key: str, value: Any) -> None:
    """Leave a value (of JSON) in `store`."""
    store.set(key, json.dumps(value))


def look(store: dist.Store, key: str) -> Any:
    """The value of `key`, None while there is none. Raises ConnectionError without its host."""
    try:
        return json.loads(store.get(key)) if store.check([key]) else None
    except dist.DistError as error:
        raise ConnectionError(str(error).splitlines()[0]) from None
