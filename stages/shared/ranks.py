"""Ranks: processes that compute one result together. No other file imports torch.distributed.

A rank is one process with one GPU, or in tests with a share of the CPU. launch.py starts
ranks, each with the environment of torchrun.
"""

import json
import os
import re
import socket
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from stages.shared.process import StageError
from stages.shared.screen import brief, on_screen

# Timeout for other ranks. The variable is for tests of ranks that hang.
TIMEOUT = timedelta(seconds=float(os.environ.get("RANKS_TIMEOUT", "300")))
# Seconds for a store to answer, after a connection.
ANSWER_SECONDS = 10.0
# Parts of the error messages of gloo, which raises plain RuntimeErrors, and NCCL.
_OF_WAITING = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
# How NCCL says that its own buffers do not fit: CUDA's error, or its own where that is lost.
_OF_MEMORY = ("out of memory", "Failed to CUDA calloc")


class World:
    """The ranks of one computation; this process is number `rank` of `size`.

    For a single process the methods do nothing. Values are exchanged over the CPU (gloo) and never
    wait for a GPU; gradients use NCCL. Every rank must make the same calls in the same order.
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
        """Wait until all ranks have arrived here."""
        self.gather(None)

    def equalize(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copy rank 0's values into `tensors`, which have the same shapes on all ranks."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def leave(self) -> None:
        """Leave the group, at the end."""
        if self.size > 1:
            dist.destroy_process_group()


ALONE = World()


def is_of_waiting(error: BaseException) -> bool:
    """Whether a rank failed only because others did not answer."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OF_WAITING)


def lacks_gpu_memory(error: BaseException) -> bool:
    """Whether a GPU ran out of memory, in torch's allocator or in NCCL."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, dist.DistError) and any(text in str(error) for text in _OF_MEMORY)


def whole_number(variable: str, otherwise: int, least: int, most: int) -> int:
    """The whole number in an environment variable, or `otherwise` where it is unset or empty.

    Raises StageError if it is not a whole number from `least` to `most`.
    """
    text = os.environ.get(variable) or str(otherwise)
    # Longer ones Python may refuse to convert.
    number = int(text) if re.fullmatch("-?[0-9]{1,18}", text) else None
    if number is None or not least <= number <= most:
        raise StageError(
            f"{variable} is {brief(text)} but must be a whole number from {least} to {most:,}"
        )
    return number


def host(address: str = "127.0.0.1", port: int = 0, everywhere: bool = False) -> dist.TCPStore:
    """A store for ranks and machines to communicate, served by this process at `address`.

    Port 0 chooses a free one. With `everywhere` it listens on all addresses of this machine, since
    others may know it by another. Raises OSError if the port is taken.
    """
    listening = socket.create_server(("" if everywhere else address, port))
    # The store closes it.
    number, port = listening.fileno(), listening.getsockname()[1]
    listening.detach()
    return dist.TCPStore(
        address, port, is_master=True, wait_for_workers=False, master_listen_fd=number
    )


class Silent(ConnectionError):
    """What accepts connections at an address never answers."""


def connect(address: str, port: int, seconds: float = 60) -> dist.TCPStore:
    """The store hosted by another process.

    Raises ConnectionError if there is none, Silent if something else is there and says nothing.
    """
    wait, found = timedelta(seconds=seconds), Future[dist.TCPStore]()

    def attempt() -> None:
        try:
            found.set_result(
                dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=wait)
            )
        except BaseException as error:
            found.set_exception(error)

    # torch limits the time to connect, but not to wait for the first answer.
    threading.Thread(target=attempt, daemon=True).start()
    try:
        return found.result(seconds + ANSWER_SECONDS)
    except dist.DistError as error:
        raise ConnectionError(str(error).splitlines()[0]) from None
    except TimeoutError:
        raise Silent(
            f"what listens at {on_screen(address)}:{port} does not answer and is no training run; "
            "check the address that the first machine prints"
        ) from None


def put(store: dist.Store, key: str, value: Any) -> None:
    """Put a JSON value into `store`."""
    store.set(key, json.dumps(value))


def look(store: dist.Store, key: str) -> Any:
    """The value of `key`, or None. Raises ConnectionError if the host is gone."""
    try:
        return json.loads(store.get(key)) if store.check([key]) else None
    except dist.DistError as error:
        raise ConnectionError(str(error).splitlines()[0]) from None
