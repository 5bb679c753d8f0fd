"""Sources of models and data sets: Hugging Face repositories, folders, Python packages.

`Repository` and `Folder` have the same interface: `files` (name -> bytes), `get(names, target)`,
`commit`, `license`, `sums` (name -> SHA-256, if `get` has computed it), and `private`: not public,
or unknown. Only named files are fetched, and none is executed.
"""

import re
import shutil
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from stages.shared.dataset_card import license_in, read_card
from stages.shared.foreign import check_name
from stages.shared.hub import Repository, hub_errors, repo_type
from stages.shared.outputs import write_json
from stages.shared.params import Model, Source
from stages.shared.process import StageError, sha256

DEFAULT_PACKAGES = Path("requirements-default.lock")
# DVC may link tracked files to its cache, which may be outside the project.
_DVC_OBJECT = re.compile(r"/files/md5/[0-9a-f]{2}/[0-9a-f]{30}")


class Folder:
    """Files on this machine. They are copied, not linked, since DVC makes its files read-only."""

    def __init__(self, root: Path, commit: str | None = None, trusted: bool = False):
        """List `root`, a folder or one file.

        Raises StageError for a link that leads out of the folder, unless it is `trusted`.
        """
        self.root, self.commit = (root.parent if root.is_file() else root), commit
        self.private = True
        self.files: dict[str, int] = {}
        self.sums: dict[str, str] = {}
        home = self.root.resolve()
        for path in [root] if not root.is_dir() else sorted(root.rglob("*")):
            target = _target(path)
            inside = target.is_relative_to(home) or _DVC_OBJECT.search(str(target))
            if not (inside or trusted):
                raise StageError(
                    f"{path} is a link to {target}, outside {self.root}; copy the file there"
                )
            if path.is_file():
                name = check_name(path.relative_to(self.root).as_posix(), str(self.root))
                self.files[name] = path.stat().st_size
            elif not path.is_dir():
                raise StageError(f"{path} is neither a file nor a folder; remove it from there")
        self.license = license_in(read_card(self.root)) if "README.md" in self.files else None

    def get(self, names: list[str], target: Path) -> None:
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.root / name, target / name)


def _target(path: Path) -> Path:
    """`path` with links resolved. Raises StageError for circular or dangling links."""
    try:
        return path.resolve(strict=True)
    except (FileNotFoundError, RuntimeError):  # the latter for a circle
        raise StageError(f"{path} is a dangling link; remove it, or fetch its target") from None


def open_source(kind: str, section: Model | Source) -> Repository | Folder:
    """The repository or the folder that `section` of params.yaml names."""
    if section.source == "local":
        path = Path(section.id)
        if not path.exists():
            raise StageError(f"{kind}.id: {path} does not exist")
        return Folder(path)
    from huggingface_hub import constants

    assert section.revision is not None  # Null only for a local folder.
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
            f"the package {name} is {found.version}, but params.yaml says {version}; run: {install}"
        )
    return found


def copy_license(found: Distribution, out: Path) -> str | None:
    """Copy the licence files of a package; returns the licence's name, if the package states it."""
    for file in found.files or []:
        if re.match(r"licen[cs]e", file.name, re.IGNORECASE) and ".dist-info" in file.parts[0]:
            # LICENSE.txt would look like data to a stage that reads text files.
            shutil.copyfile(file.locate(), out / file.name.removesuffix(".txt"))
    # Python 3.11 has `get`, but its type stub does not.
    says = found.metadata.get  # type: ignore[attr-defined]
    classified = [
        value.rpartition(" :: ")[2]
        for value in found.metadata.get_all("Classifier") or []
        if value.startswith("License :: ")
    ]
    return says("License-Expression") or says("License") or ", ".join(classified) or None


def keep_only(folder: Path, names: list[str]) -> None:
    """Remove all files but `names`; an interrupted download may have left others."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(folder).as_posix() not in names:
            path.unlink()


def write_source(
    folder: Path,
    section: Model | Source,
    commit: str | None,
    license: str | None,
    sums: dict[str, str],
    private: bool = False,
) -> None:
    """Write source.json: the source of the files in `folder`, and the SHA-256 of each.

    `sums` has those that are known; the others are computed. `private` matters only for the Hub.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    record: dict = {
        "source": section.source,
        "id": section.id,
        # The name of a branch is not recorded, so that pinning its commit changes no byte.
        "revision": commit or section.revision,
        "commit": commit,
        "license": license,
        "files": {name: sums.get(name) or sha256(path) for name, path in files.items()},
    }
    if private and section.source == "hub":
        record["private"] = True
    write_json(folder / "source.json", record)
