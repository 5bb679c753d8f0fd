"""Where a model or a data set comes from: a Hugging Face repository, a folder, a Python package.

`Repository` and `Folder` look alike to a stage: `files` (name -> bytes), `get(names, target)`,
`commit` and `license`. Nothing that is fetched is executed, and only named files are fetched.
"""

import os
import re
import shutil
from contextlib import contextmanager
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath

import yaml

from stages.shared.stage import StageError, sha256, write_text

COMMIT = re.compile(r"[0-9a-f]{40}")
# DVC may link what it tracks into its cache, which lies elsewhere when it is shared.
_DVC_OBJECT = re.compile(r"/files/md5/[0-9a-f]{2}/[0-9a-f]{30}$")


class Folder:
    """A folder on this machine. Its files are copied: DVC makes what it keeps read-only, and a
    link would reach the user's own file."""

    def __init__(self, path: Path, commit: str | None = None, links: bool = False):
        """`links` allows links that leave the folder. Raises StageError at one otherwise."""
        self.path, self.commit = path, commit
        self.files: dict[str, int] = {}
        for file in sorted(p for p in path.rglob("*") if p.is_symlink() or p.is_file()):
            target = file.resolve()
            inside = target.is_relative_to(path.resolve()) or _DVC_OBJECT.search(str(target))
            if not (inside or links):
                raise StageError(
                    f"{file}: is a link that leaves {path}; put the file itself there: "
                    f"cp --remove-destination {target} {file}"
                )
            if target.is_file():
                self.files[file.relative_to(path).as_posix()] = target.stat().st_size
        self.license = card(path)["license"] if "README.md" in self.files else None

    def get(self, names: list[str], target: Path) -> None:
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.path / name, target / name)


class Repository:
    """A model or data set of the Hugging Face Hub at one commit."""

    def __init__(self, kind: str, id: str, revision: str):
        """Ask the Hub for the commit and the files. `kind` is model or dataset."""
        from huggingface_hub import HfApi

        self.kind, self.id, self.revision = kind, id, revision
        with hub_errors(kind, id, revision):
            info = HfApi().repo_info(id, repo_type=kind, revision=revision, files_metadata=True)
        self.commit = info.sha
        self.license = info.card_data.get("license") if info.card_data else None
        self.files = {file.rfilename: file.size or 0 for file in info.siblings}
        self._sha256 = {file.rfilename: file.lfs.sha256 for file in info.siblings if file.lfs}
        if not COMMIT.fullmatch(revision):
            print(
                f"warning: {id}: {revision} may move; pin it in params.yaml: "
                f"revision: {self.commit}"
            )

    def get(self, names: list[str], target: Path) -> None:
        """Download into `target`, going on where an interrupted download stopped.

        Raises StageError when a file is missing at the end, has another size or another SHA-256
        than the Hub says, or would not fit on the disk.
        """
        from huggingface_hub import snapshot_download

        missing = {n: s for n, s in self.files.items() if n in names and _size(target / n) != s}
        free = shutil.disk_usage(target).free
        if sum(missing.values()) > free:
            raise StageError(
                f"{self.id}: {sum(missing.values()) / 1e9:.1f} GB to download, "
                f"{free / 1e9:.1f} GB free in {target.parent}"
            )
        with hub_errors(self.kind, self.id, self.revision):
            snapshot_download(
                self.id,
                repo_type=self.kind,
                revision=self.commit,
                local_dir=target,
                # Names, not patterns: a bracket in one must not match other files.
                allow_patterns=[re.sub(r"([*?[])", r"[\1]", name) for name in names],
            )
        for name in names:
            # Without a connection snapshot_download takes what is there for the whole.
            if _size(target / name) != self.files[name]:
                raise StageError(f"{self.id}: {name} is incomplete; run again to go on")
            if name in self._sha256 and sha256(target / name) != self._sha256[name]:
                (target / name).unlink()
                raise StageError(f"{self.id}: {name} came damaged (SHA-256); run again")


def open_source(kind: str, section) -> Repository | Folder:
    """The repository or folder that a params section (`model` or `dataset`) names."""
    if section.source == "local":
        path = Path(section.id)
        if not path.is_dir():
            raise StageError(f"{kind}.id: {path} is not a folder")
        return Folder(path)
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return _cached(kind, section.id, section.revision)
    return Repository(kind, section.id, section.revision)


def _cached(kind: str, id: str, revision: str) -> Folder:
    """The snapshot in the Hugging Face cache of this machine, without a connection."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = snapshot_download(id, repo_type=kind, revision=revision, local_files_only=True)
    except LocalEntryNotFoundError:
        raise StageError(
            f"{id}: HF_HUB_OFFLINE is set and {revision} is not in the Hugging Face cache; fetch "
            f"it where there is a network: hf download {id} --repo-type {kind} --revision {revision}"
        ) from None
    # In that cache every file is a link.
    return Folder(Path(path), commit=Path(path).name, links=True)


@contextmanager
def hub_errors(kind: str, id: str, revision: str):
    """Turn the errors of huggingface_hub into one line that says what to do."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{id}"
    try:
        yield
    except errors.GatedRepoError:
        raise StageError(
            f"{id} is gated: accept its licence at {page} and set HF_TOKEN to a token of that account"
        ) from None
    except errors.RevisionNotFoundError:
        raise StageError(f"{id} has no revision {revision}; see {page}/commits/main") from None
    except errors.RepositoryNotFoundError:
        raise StageError(
            f"{kind} {id} does not exist or is private; check {kind}.id, or set HF_TOKEN ({page})"
        ) from None
    except errors.HFValidationError:
        raise StageError(f"{kind}.id: {id} is not a Hugging Face id such as owner/name") from None
    except errors.HfHubHTTPError as error:
        code = error.response.status_code
        hint = "; check HF_TOKEN" if code in (401, 403) else "; run again to go on"
        raise StageError(f"{id}: the Hub answered {code}{hint}") from None
    except (errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError):
        raise StageError(f"{id}: no connection to the Hub; run again to go on") from None


def package(name: str, version: str) -> Distribution:
    """The installed package `name`, never imported. Raises StageError when it is another version."""
    install = f"pip install --no-deps {name}=={version}"
    if Path("requirements-default.lock").is_file():
        lines = Path("requirements-default.lock").read_text(encoding="utf-8")
        if f"{name}=={version} " in lines:
            install = "pip install --no-deps --require-hashes -r requirements-default.lock"
    try:
        found = distribution(name)
    except PackageNotFoundError:
        raise StageError(f"the package {name} is not installed; run: {install}") from None
    if found.version != version:
        raise StageError(
            f"the package {name} is {found.version}, params.yaml wants {version}; run: {install}"
        )
    return found


def license_of(found: Distribution) -> str | None:
    return found.metadata.get("License-Expression") or found.metadata.get("License")


def card(folder: Path) -> dict:
    """The YAML at the head of README.md, with at least the key `license`."""
    text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    head = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        data = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        data = None
    return {"license": None} | (data if isinstance(data, dict) else {})


def check_name(name: str, source: str) -> str:
    """`name` if it stays within its folder; StageError otherwise."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise StageError(f"{source}: the file name {name!r} leaves its folder")
    return name


def finish(folder: Path, names: list[str], section, source) -> None:
    """Leave `names` alone in `folder` (a resumed download may hold more) and add source.json."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(folder).as_posix() not in names:
            path.unlink()
    write_source(folder, section, source.commit, source.license)


def write_source(folder: Path, section, commit: str | None, license: str | None) -> None:
    """Write source.json: where the files of `folder` come from, and the SHA-256 of each."""
    import json

    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "source.json")
    record = {
        "source": section.source,
        "id": section.id,
        "revision": section.revision,
        "commit": commit,
        "license": license,
        "files": {p.relative_to(folder).as_posix(): sha256(p) for p in files},
    }
    write_text(folder / "source.json", json.dumps(record, indent=2) + "\n")


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
