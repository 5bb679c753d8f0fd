"""Free the disk of merged models that the workspace does not use.

    python -m tools.free          say what would be freed
    python -m tools.free --yes    free it

Every run leaves a merged model in DVC's cache, 16 bits a parameter. It is made again from the base
and the adapter by `dvc repro` (merge and what follows, no training), so only the workspace's is
worth its disk. Data, bases, adapters and metrics of every branch, tag and experiment stay. To free
those of experiments too: dvc exp remove NAME, then
dvc gc --workspace --all-branches --all-tags --all-experiments
"""

import argparse
import json
import os
from pathlib import Path

from dvc.repo import Repo

from tools.revision import DVC_LOCK, DVC_YAML, Revision, fail, git


def remade(revision: Revision) -> set[str]:
    """Outputs that dvc.yaml marks `push: false`: not worth storing, since quickly made again."""
    return {
        path
        for stage in revision.yaml(DVC_YAML).get("stages", {}).values()
        for entry in stage.get("outs", [])
        if isinstance(entry, dict)
        for path, options in entry.items()
        if options.get("push") is False
    }


def hashes(revision: Revision) -> dict[str, str]:
    """Path of each output in dvc.lock -> its MD5."""
    return {
        out["path"]: out["md5"]
        for stage in revision.yaml(DVC_LOCK).get("stages", {}).values()
        for out in stage.get("outs", [])
    }


def objects(cache: Path, md5: str) -> set[Path]:
    """Files of DVC's cache that hold an output: one, or a listing and the files it lists."""
    path = cache / md5[:2] / md5[2:]
    found = {path}
    if md5.endswith(".dir") and path.exists():
        found |= {
            cache / entry["md5"][:2] / entry["md5"][2:] for entry in json.loads(path.read_bytes())
        }
    return found


def unused(cache: Path, workspace: Revision, others: list[Revision]) -> set[Path]:
    """Objects of `others` that only outputs made again quickly need, and the workspace does not."""
    keep: set[Path] = set()
    for md5 in hashes(workspace).values():
        keep |= objects(cache, md5)
    drop: set[Path] = set()
    for revision in others:
        quick = remade(revision)
        for path, md5 in hashes(revision).items():
            (drop if path in quick else keep).update(objects(cache, md5))
    return {path for path in drop - keep if path.exists()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--yes", action="store_true", help="delete, and do not only say so")
    arguments = parser.parse_args()
    names = git("for-each-ref", "--format=%(refname)").stdout.decode().split()
    try:
        commits = [Revision(name) for name in [*names, "HEAD"]]
        cache = Path(Repo().cache.local.path)
        found = unused(cache, Revision(None), commits)
    except (LookupError, ValueError) as error:
        fail("free", str(error))
    size = sum(path.stat().st_size for path in found) / 1e9
    if arguments.yes:
        for path in found:
            os.remove(path)
    verb = "freed" if arguments.yes else "would free (with --yes)"
    print(f"free: {verb} {size:.2f} GB: {len(found)} files of merged models in {cache}")


if __name__ == "__main__":
    main()
