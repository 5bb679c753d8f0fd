"""Writes safetensors files from blocks of rows, hashing and syncing beside the writing."""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from stages.shared.process import StageError
from stages.shared.weights import READ, Weights

# Bytes synced at once: few waits for the disk, and few pages in memory.
SYNC_BYTES = 2**25


class Entry(NamedTuple):
    """A tensor of a file to be written. `letters`: its type in safetensors."""

    letters: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * READ[self.letters].itemsize


def copied_entry(weights: Weights, name: str) -> Entry:
    """The entry for a copy of a tensor. Raises StageError for an unknown type."""
    if (letters := weights.dtypes[name]) not in READ:
        raise StageError(f"{weights.files[name]}: {name} is {letters}, which is not known here")
    return Entry(letters, weights.shapes[name])


def write_shard(file: Path, entries: dict[str, Entry], blocks: Iterable[torch.Tensor]) -> str:
    """Write one safetensors file, synced to disk, from the row blocks of its tensors in order.

    The format: https://github.com/huggingface/safetensors#format. Returns the file's SHA-256.
    Hashing and syncing run in threads, so that the disk is busy from the first block on.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, entry in entries.items():
        end = offset + entry.nbytes
        header[name] = {
            "dtype": entry.letters,
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256()
    with (
        file.open("wb") as out,
        ThreadPoolExecutor(1) as hasher,
        ThreadPoolExecutor(1) as syncer,
    ):
        out.write(start)
        hashed = hasher.submit(digest.update, start)
        synced, unsynced = syncer.submit(_onto_disk, out.fileno()), 0
        for values in blocks:
            data = values.reshape(-1).view(torch.uint8).numpy().data
            hashed.result()
            hashed = hasher.submit(digest.update, data)
            out.write(data)
            unsynced += len(data)
            if unsynced >= SYNC_BYTES and synced.done():
                synced.result()
                synced, unsynced = syncer.submit(_onto_disk, out.fileno()), 0
        hashed.result()
        synced.result()
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()


def _onto_disk(file: int) -> None:
    """Sync what is written of `file` and release its pages, which the next writes can use.

    Otherwise each write needs new pages to cache a file that may exceed memory. In a virtual
    machine a new page costs several times the write, since the host must find it.
    """
    os.fdatasync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
