"""A repository of the Hugging Face Hub: its listing, and its files, complete or absent."""

import hashlib
import io
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from stages.shared.bounded import bounded
from stages.shared.dataset_card import known_of, license_in
from stages.shared.foreign import Foreign, check_name, held_to
from stages.shared.process import StageError, sha256
from stages.shared.screen import on_screen, tell

CONNECTIONS = 4
# A connection that transfers less in that time is dropped.
CHUNK_BYTES = 1_000_000
STALL_SECONDS = 60


class _Answer(Foreign):
    # huggingface_hub returns objects with unchecked attributes.
    model_config = ConfigDict(from_attributes=True)


class Large(_Answer):
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Entry(_Answer):
    rfilename: str
    size: Annotated[int, Field(ge=0, lt=2**50)]
    blob_id: Annotated[str, Field(pattern="^[0-9a-f]{40}$")]
    lfs: Large | None


class Listing(_Answer):
    """The Hub's answer about a repository."""

    sha: Annotated[str, Field(pattern="^[0-9a-f]{40}$")]
    siblings: list[Entry]
    private: bool | None = None
    gated: bool | str | None = None


class _Part(io.FileIO):
    """A file that is being downloaded; calls `moved` with its size after each write."""

    moved: Callable[[int], None]

    def write(self, content) -> int:
        written = super().write(content)
        self.moved(self.tell())
        return written


class Repository:
    """A model or a data set of the Hugging Face Hub at one commit."""

    def __init__(self, kind: str, id: str, revision: str):
        """Ask the Hub for the commit of `revision` and its files. `kind` is a section's name."""
        from huggingface_hub import HfApi

        def ask() -> tuple[Listing, str | None]:
            # Its types are optional, though set with revision and files_metadata.
            info: Any
            with hub_errors(kind, id, revision):
                info = HfApi().repo_info(
                    id, repo_type=repo_type(kind), revision=revision, files_metadata=True
                )
                card, _ = known_of(info.card_data.to_dict() if info.card_data else {})
            return held_to(Listing, info, f"{id}: the Hub's answer"), license_in(card)

        self.kind, self.id, self.revision = kind, id, revision
        listing, self.license = bounded(ask, f"{id}: the Hub's answer", "run again")
        self.commit = listing.sha
        self.private = bool(listing.private or listing.gated)
        self._entries = {check_name(entry.rfilename, id): entry for entry in listing.siblings}
        self.files = {name: entry.size for name, entry in self._entries.items()}
        self.sums: dict[str, str] = {}
        # When each file being downloaded last grew.
        self._moved: dict[str, float] = {}
        if revision != self.commit:
            tell(
                f"warning: {id}: {revision} may move; pin it in params.yaml as "
                f"{kind}.revision: {self.commit}"
            )

    def get(self, names: list[str], target: Path) -> None:
        """Download into `target`, resuming from complete and partial files.

        A file gets its final name once it is complete and has the Hub's hash. Existing files are
        hashed too, since after a power cut a name may exist without its bytes. Does not use
        `snapshot_download`, which restarts an interrupted file.
        """
        missing = [
            name
            for name in names
            if not ((target / name).exists() and self._is_whole(name, target / name))
        ]
        parts = [target / f"{name}.part" for name in missing]
        there = sum(part.stat().st_size for part in parts if part.exists())
        size = sum(self.files[name] for name in missing) - there
        if size > (free := shutil.disk_usage(target).free):
            raise StageError(
                f"{self.id}: {size / 1e9:.1f} GB to download, {free / 1e9:.1f} GB free in "
                f"{target.parent}"
            )
        _in_parallel(lambda name: self._download(name, target), missing, self._check_moving)

    def _check_moving(self) -> None:
        """Raise StageError if a download stalls, even if the server sends single bytes."""
        now = time.monotonic()
        for name, moved in list(self._moved.items()):
            if now - moved > STALL_SECONDS:
                raise StageError(
                    f"{self.id}: {name} was slower than {CHUNK_BYTES / STALL_SECONDS / 1000:.0f} "
                    "kB/s; the downloaded part is kept, run again"
                )

    def _download(self, name: str, target: Path) -> None:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        constants.DOWNLOAD_CHUNK_SIZE = CHUNK_BYTES
        part = target / f"{name}.part"
        part.parent.mkdir(parents=True, exist_ok=True)
        if part.exists() and part.stat().st_size > self.files[name]:
            part.unlink()
        self._moved[name] = time.monotonic()
        try:
            with hub_errors(self.kind, self.id, self.revision), _Part(part, "ab") as file:
                file.moved = partial(self._note, name)
                http_get(
                    hf_hub_url(self.id, name, repo_type=repo_type(self.kind), revision=self.commit),
                    file,
                    resume_size=file.tell(),
                    # A compressed transfer could not be resumed at a byte offset.
                    headers=build_hf_headers() | {"Accept-Encoding": "identity"},
                    expected_size=self.files[name],
                    displayed_filename=on_screen(name),
                )
        finally:
            del self._moved[name]
        if not self._is_whole(name, part):
            part.unlink()
            raise StageError(f"{self.id}: {name} arrived damaged (its hash differs); run again")
        os.replace(part, target / name)

    def _note(self, name: str, size: int) -> None:
        """Record that a file has `size` bytes. Raises StageError if that is more than expected."""
        self._moved[name] = time.monotonic()
        if size > self.files[name]:
            raise StageError(f"{self.id}: the Hub's answer has the wrong length; run again")

    def _is_whole(self, name: str, path: Path) -> bool:
        """Whether `path` has the Hub's hash for `name`; stores a SHA-256 in `sums`."""
        entry = self._entries[name]
        found = sha256(path) if entry.lfs else _git_sha1(path)
        if found != (entry.lfs.sha256 if entry.lfs else entry.blob_id):
            return False
        if entry.lfs:
            self.sums[name] = found
        return True


def repo_type(kind: str) -> str:
    """The Hub's repository type for a section of params.yaml: model or dataset."""
    return "model" if kind == "model" else "dataset"


@contextmanager
def hub_errors(kind: str, id: str, revision: str):
    """Turn errors of huggingface_hub into one line with a remedy."""
    from huggingface_hub import errors

    type = repo_type(kind)
    page = f"https://huggingface.co/{'datasets/' if type == 'dataset' else ''}{id}"
    try:
        yield
    except errors.LocalEntryNotFoundError:
        raise StageError(
            f"{id}: HF_HUB_OFFLINE is set and {revision} is not in the Hugging Face cache; with "
            f"a network, run: hf download {id} --repo-type {type} --revision {revision}"
        ) from None
    except errors.GatedRepoError:
        raise StageError(
            f"{id} is gated: accept its licence at {page} and set HF_TOKEN to your token"
        ) from None
    except errors.RevisionNotFoundError:
        raise StageError(f"{id} has no revision {revision}; see {page}/commits/main") from None
    except errors.RepositoryNotFoundError:
        raise StageError(
            f"{id} is not a {type} on the Hub, or is private; correct {kind}.id, or set HF_TOKEN "
            f"to a token that may read {page}"
        ) from None
    except errors.HFValidationError:
        raise StageError(f"{kind}.id: {id!r} is not a Hugging Face id like owner/name") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        cause = "refused HF_TOKEN" if status in (401, 403) else f"answered {status}"
        raise StageError(f"{id}: the Hub {cause}; the downloaded part is kept, run again") from None
    except (errors.HTTPError, ConnectionError):
        raise StageError(
            f"{id}: the connection to the Hub failed; the downloaded part is kept, run again"
        ) from None
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        raise StageError(
            f"{id}: the answer is not from the Hub (a login page or proxy of this network?); open "
            f"{page} in a browser, and check HF_ENDPOINT"
        ) from None
    except OSError as error:
        # huggingface_hub raises it for a wrong length; errors of the disk have an errno.
        if error.errno is not None:
            raise
        raise StageError(f"{id}: the Hub's answer has the wrong length; run again") from None


def _in_parallel(
    work: Callable[[str], None], names: Iterable[str], check: Callable[[], None]
) -> None:
    """Do `work` for every name in threads; raise the first error of it or of `check` at once.

    The threads of a pool would keep the process until their downloads end, even after Ctrl-C.
    """
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    done: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def run() -> None:
        while not waiting.empty():
            try:
                work(waiting.get_nowait())
                done.put(None)
            except queue.Empty:
                return
            except Exception as error:
                done.put(error)

    names = list(names)
    for name in names:
        waiting.put(name)
    for _ in names[:CONNECTIONS]:
        threading.Thread(target=run, daemon=True).start()
    left = len(names)
    while left:
        try:
            if error := done.get(timeout=1):
                raise error
            left -= 1
        except queue.Empty:
            check()


def _git_sha1(path: Path) -> str:
    """Git's hash of a file: SHA-1 of `blob SIZE\\0` and its bytes."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
