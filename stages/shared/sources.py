"""Where a model or a data set comes from: a Hugging Face repository, a folder, a Python package.

`Repository` and `Folder` look alike to a stage: `files` (name -> bytes), `get(names, target)`,
`commit`, `license`, `sums` (name -> SHA-256, where `get` has taken it already), and `private`: not
everybody may read it, or nobody was asked. Only named files are fetched, and nothing of them is
executed.
"""

import hashlib
import os
import queue
import re
import shutil
import threading
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath
from typing import Any

from stages.shared.dataset_card import read_card
from stages.shared.outputs import write_json
from stages.shared.params import Dataset, Model
from stages.shared.process import StageError, sha256

DEFAULT_PACKAGES = Path("requirements-default.lock")
CONNECTIONS = 4
# DVC may link what it tracks into its cache, and that may lie outside the project.
_DVC_OBJECT = re.compile(r"/files/md5/[0-9a-f]{2}/[0-9a-f]{30}")


class Folder:
    """Files on this machine. They are copied: DVC makes what it keeps read-only, and through a
    link that would reach the user's own file."""

    def __init__(self, root: Path, commit: str | None = None, trusted: bool = False):
        """List `root`, a folder or one file.

        Raises StageError at a link that leads out of the folder, unless it is `trusted`.
        """
        self.root, self.commit = (root.parent if root.is_file() else root), commit
        self.private = True
        self.files: dict[str, int] = {}
        self.sums: dict[str, str] = {}
        home = self.root.resolve()
        for path in [root] if root.is_file() else sorted(root.rglob("*")):
            target = path.resolve()
            inside = target.is_relative_to(home) or _DVC_OBJECT.search(str(target))
            if not (inside or trusted):
                raise StageError(
                    f"{path} is a link to {target}, outside {self.root}; copy it there"
                )
            if path.is_file():
                self.files[path.relative_to(self.root).as_posix()] = path.stat().st_size
        self.license = license_in(read_card(self.root)) if "README.md" in self.files else None

    def get(self, names: list[str], target: Path) -> None:
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.root / name, target / name)


class Repository:
    """A model or a data set of the Hugging Face Hub at one commit."""

    def __init__(self, kind: str, id: str, revision: str):
        """Ask the Hub for the commit of `revision` and its files. `kind` is a section's name."""
        from huggingface_hub import HfApi

        self.kind, self.id, self.revision = kind, id, revision
        # By its types it may lack all that a revision and files_metadata bring.
        info: Any
        with hub_errors(kind, id, revision):
            info = HfApi().repo_info(
                id, repo_type=repo_type(kind), revision=revision, files_metadata=True
            )
        self.commit: str = info.sha
        self.license = license_in(info.card_data.to_dict()) if info.card_data else None
        self.private = bool(info.private or info.gated)
        self._entries = {check_name(entry.rfilename, id): entry for entry in info.siblings}
        self.files: dict[str, int] = {name: entry.size for name, entry in self._entries.items()}
        self.sums: dict[str, str] = {}
        if revision != self.commit:
            print(
                f"warning: {id}: {revision} may move; pin it in params.yaml as "
                f"{kind}.revision: {self.commit}"
            )

    def get(self, names: list[str], target: Path) -> None:
        """Download into `target`. What is there already is not fetched again, half files included.

        A file gets its name when it is whole and has the hash that the Hub gives, and is asked
        for that again: a machine that was switched off may have kept the name and not the bytes.
        Not `snapshot_download`, which begins an interrupted file anew.
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
        _in_parallel(lambda name: self._download(name, target), missing)

    def _download(self, name: str, target: Path) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        part = target / f"{name}.part"
        part.parent.mkdir(parents=True, exist_ok=True)
        if part.exists() and part.stat().st_size > self.files[name]:
            part.unlink()
        with hub_errors(self.kind, self.id, self.revision), part.open("ab", buffering=0) as file:
            http_get(
                hf_hub_url(self.id, name, repo_type=repo_type(self.kind), revision=self.commit),
                file,
                resume_size=file.tell(),
                # Compressed on the way, a file could not be taken up again at a byte.
                headers=build_hf_headers() | {"Accept-Encoding": "identity"},
                expected_size=self.files[name],
                displayed_filename=name,
            )
        if not self._is_whole(name, part):
            part.unlink()
            raise StageError(f"{self.id}: {name} came damaged (its hash differs); run again")
        os.replace(part, target / name)

    def _is_whole(self, name: str, path: Path) -> bool:
        """Whether `path` has the hash that the Hub gives for `name`; notes a SHA-256 in `sums`."""
        entry = self._entries[name]
        found = sha256(path) if entry.lfs else _git_sha1(path)
        if found != (entry.lfs.sha256 if entry.lfs else entry.blob_id):
            return False
        if entry.lfs:
            self.sums[name] = found
        return True


def repo_type(kind: str) -> str:
    """What the Hub calls that which a section of params.yaml names: a model or a dataset."""
    return "model" if kind == "model" else "dataset"


def open_source(kind: str, section: Model | Dataset) -> Repository | Folder:
    """The repository or the folder that `section` of params.yaml names."""
    if section.source == "local":
        path = Path(section.id)
        if not path.exists():
            raise StageError(f"{kind}.id: {path} does not exist")
        return Folder(path)
    from huggingface_hub import constants

    assert section.revision is not None  # Null for a local folder alone.
    if constants.HF_HUB_OFFLINE:
        return _cached(kind, section.id, section.revision)
    return Repository(kind, section.id, section.revision)


def _cached(kind: str, id: str, revision: str) -> Folder:
    """The snapshot in this machine's Hugging Face cache, for a machine without a network."""
    from huggingface_hub import snapshot_download

    with hub_errors(kind, id, revision):
        path = snapshot_download(
            id, repo_type=repo_type(kind), revision=revision, local_files_only=True
        )
    # Every file of that cache is a link.
    return Folder(Path(path), commit=Path(path).name, trusted=True)


@contextmanager
def hub_errors(kind: str, id: str, revision: str):
    """Turn the errors of huggingface_hub into one line with the remedy."""
    from huggingface_hub import errors

    type = repo_type(kind)
    page = f"https://huggingface.co/{'datasets/' if type == 'dataset' else ''}{id}"
    try:
        yield
    except errors.LocalEntryNotFoundError:
        raise StageError(
            f"{id}: HF_HUB_OFFLINE is set and {revision} is not in the Hugging Face cache; where "
            f"there is a network: hf download {id} --repo-type {type} --revision {revision}"
        ) from None
    except errors.GatedRepoError:
        raise StageError(
            f"{id} is gated: accept its licence at {page} and set HF_TOKEN to a token of yours"
        ) from None
    except errors.RevisionNotFoundError:
        raise StageError(f"{id} has no revision {revision}; see {page}/commits/main") from None
    except errors.RepositoryNotFoundError:
        raise StageError(
            f"{id} is no {type} on the Hub, or a private one; correct {kind}.id, or set HF_TOKEN "
            f"to a token that may read {page}"
        ) from None
    except errors.HFValidationError:
        raise StageError(f"{kind}.id: {id!r} is no Hugging Face id such as owner/name") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        cause = "refused HF_TOKEN" if status in (401, 403) else f"answered {status}"
        raise StageError(f"{id}: the Hub {cause}; what has arrived is kept, run again") from None
    except (errors.HTTPError, ConnectionError):
        raise StageError(
            f"{id}: the connection to the Hub failed; what has arrived is kept, run again"
        ) from None
    except OSError as error:
        # huggingface_hub's word for an answer of the wrong length; the disk's faults have a number.
        if error.errno is not None:
            raise
        raise StageError(f"{id}: an answer of the wrong length came; run again") from None


def package(name: str, version: str) -> Distribution:
    """The installed package `name`, which is never imported.

    Raises StageError with the command that installs it when it is missing or another version.
    """
    install = f"pip install --no-deps {name}=={version}"
    if DEFAULT_PACKAGES.exists() and f"{name}=={version} " in DEFAULT_PACKAGES.read_text():
        install = f"pip install --no-deps --require-hashes -r {DEFAULT_PACKAGES}"
    try:
        found = distribution(name)
    except PackageNotFoundError:
        raise StageError(f"the package {name} is not installed; run: {install}") from None
    if found.version != version:
        raise StageError(
            f"the package {name} is {found.version}, and params.yaml says {version}; run: {install}"
        )
    return found


def copy_license(found: Distribution, out: Path) -> str | None:
    """Copy the licence files of a package; return the licence's name, where the package says it."""
    for file in found.files or []:
        if re.match(r"licen[cs]e", file.name, re.IGNORECASE) and ".dist-info" in file.parts[0]:
            # LICENSE.txt would look like data to a stage that reads text files.
            shutil.copyfile(file.locate(), out / file.name.removesuffix(".txt"))
    # Python 3.11 has `get` too, and its stub does not.
    says = found.metadata.get  # type: ignore[attr-defined]
    classified = [
        value.rpartition(" :: ")[2]
        for value in found.metadata.get_all("Classifier") or []
        if value.startswith("License :: ")
    ]
    return says("License-Expression") or says("License") or ", ".join(classified) or None


def license_in(card: dict) -> str | None:
    """The licence that a card names: the Hub's short name, or what `other` stands for."""
    names = card.get("license_name") if card.get("license") == "other" else card.get("license")
    return ", ".join(map(str, names)) if isinstance(names, list) else names


def check_name(name: str, source: str) -> str:
    """`name` if it stays within its folder. Raises StageError otherwise."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise StageError(f"{source}: the file name {name!r} leads out of its folder")
    return name


def keep_only(folder: Path, names: list[str]) -> None:
    """Remove all but `names`: an interrupted download may have left more."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(folder).as_posix() not in names:
            path.unlink()


def write_source(
    folder: Path,
    section: Model | Dataset,
    commit: str | None,
    license: str | None,
    sums: dict[str, str],
    private: bool = False,
) -> None:
    """Write source.json: where the files of `folder` come from, and the SHA-256 of each.

    `sums` holds those that are known; the others are taken here. `private` is of interest where
    the name does not say it: for the Hub.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    record: dict = {
        "source": section.source,
        "id": section.id,
        "revision": section.revision,
        "commit": commit,
        "license": license,
        "files": {name: sums.get(name) or sha256(path) for name, path in files.items()},
    }
    if private and section.source == "hub":
        record["private"] = True
    write_json(folder / "source.json", record)


def _in_parallel(work: Callable[[str], None], names: Iterable[str]) -> None:
    """Do `work` for every name and raise the first error at once.

    The threads of a pool would hold the interpreter until their downloads end: after Ctrl-C too.
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
    for _ in names:
        if error := done.get():
            raise error


def _git_sha1(path: Path) -> str:
    """Git's name for the content of a file: SHA-1 of `blob SIZE\\0` and its bytes."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
