"""Free the disk of merged models that the workspace does not use.

    python -m tools.free          list what would be freed
    python -m tools.free --yes    free it

Every run leaves a merged model in DVC's cache, 2 bytes a parameter. `dvc repro` can recreate it
from base and adapter without training, so only the workspace's is kept. Data, bases, adapters and
metrics of every branch, tag and experiment stay, and so does everything that another pipeline or
`dvc add` in the repository uses. To drop experiments altogether: dvc exp remove NAME, then
dvc gc --workspace --all-branches --all-tags --all-experiments
"""

import argparse
import posixpath
from pathlib import Path

from dvc.exceptions import DvcException
from dvc.repo import Repo

from stages.shared.foreign import read_json
from stages.shared.process import StageError
from tools.revision import DVC_LOCK, Revision, git
from tools.schemas import LISTING, LOCK, TRACKED
from tools.screen import fail


def outputs(revision: Revision) -> tuple[set[str], set[str]]:
    """Hashes of a revision's outputs: those that are quickly recreated, and the rest.

    dvc.yaml marks the former `push: false`. The rest includes the outputs of other pipelines and of
    `dvc add` in the repository, which share the cache.
    """
    paths = {
        entry.path
        for stage in revision.pipeline.stages.values()
        for entry in stage.outs
        if entry.options.get("push") is False
    }
    quick: set[str] = set()
    rest: set[str] = set()
    for file in revision.files:
        path = posixpath.relpath(file, revision.prefix or ".")
        if posixpath.basename(file) == DVC_LOCK:
            for run in revision.yaml(path, LOCK).stages.values():
                for out in run.outs:
                    ours = path == DVC_LOCK and out.path in paths
                    (quick if ours else rest).add(out.md5)
        elif file.endswith(".dvc"):
            rest |= {out.md5 for out in revision.yaml(path, TRACKED).outs if out.md5}
    return quick, rest


def objects(cache: Path, md5: str) -> set[Path]:
    """Cache files of an output: one file, or a listing and the files it lists."""
    path = cache / md5[:2] / md5[2:]
    if not md5.endswith(".dir") or not path.exists():
        return {path}
    listing = read_json(path.read_bytes(), LISTING, str(path))
    return {path} | {cache / entry.md5[:2] / entry.md5[2:] for entry in listing}


def unused(cache: Path, workspace: Revision, others: list[Revision]) -> set[Path]:
    """Cache files that only quickly recreated outputs of `others` use, not the workspace's."""
    quick, rest = outputs(workspace)
    keep, drop = quick | rest, set[str]()
    for revision in others:
        quick, rest = outputs(revision)
        drop |= quick
        keep |= rest
    kept = {path for md5 in keep for path in objects(cache, md5)}
    dropped = {path for md5 in drop for path in objects(cache, md5)}
    return {path for path in dropped - kept if path.exists()}


def commits() -> list[Revision]:
    """HEAD and the commits that branches, tags and experiments point to."""
    command = ("-c", "log.showSignature=false", "log", "--no-walk", "--all", "HEAD", "--format=%S")
    return [Revision(name) for name in git(*command).decode().split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--yes", action="store_true", help="delete instead of listing")
    arguments = parser.parse_args()
    try:
        revisions = commits()
        with Repo() as repo:
            cache = Path(repo.cache.local.path)
        found = unused(cache, Revision(None), revisions)
        size = sum(path.stat().st_size for path in found) / 1e9
        if arguments.yes:
            for path in found:
                path.unlink()
    except (StageError, DvcException) as error:
        fail("free", error)
    except OSError as error:
        fail("free", f"{error.filename}: {error.strerror}; fix its permissions and run it again")
    verb = "freed" if arguments.yes else "would free (with --yes)"
    print(f"free: {verb} {size:.2f} GB: {len(found)} files of merged models in {cache}")


if __name__ == "__main__":
    main()
