"""Recreate a stage's outputs if one of their files is damaged.

    python -m tools.repair quantize

DVC never verifies its cache and would restore a damaged file from it. So the cached outputs of the
stage are hashed first, and damaged files are deleted. Outputs are then restored from the cache or a
remote if possible; otherwise the stage runs.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from dvc.repo import Repo

from stages.shared.process import StageError
from stages.shared.screen import on_screen, tell
from tools.free import objects
from tools.revision import DVC_LOCK, Revision


def is_damaged(file: Path) -> bool:
    """Whether a cache file (00/1122…, named by its MD5) does not match its name."""
    if not file.exists():
        return False
    with file.open("rb") as content:
        actual = hashlib.file_digest(content, "md5").hexdigest()
    return actual != (file.parent.name + file.name).removesuffix(".dir")


def damaged(cache: Path, md5: str) -> list[Path]:
    """The damaged cache files of an output."""
    listing = cache / md5[:2] / md5[2:]
    # A damaged listing cannot tell the folder's files.
    return [listing] if is_damaged(listing) else list(filter(is_damaged, objects(cache, md5)))


def repair(name: str) -> int:
    """Delete damaged files of the stage `name` and recreate them. Returns DVC's exit status."""
    here = Revision(None)
    recorded, declared = here.lock.stages, here.pipeline.stages
    if name not in recorded or name not in declared:
        raise StageError(f"{DVC_LOCK} has no stage {name}; it has {', '.join(recorded)}")
    # Metrics and plots are in git and not cached.
    cached = declared[name].paths("outs")
    outs = [out for out in recorded[name].outs if out.path in cached]
    with Repo() as repo:
        cache, remote = Path(repo.cache.local.path), repo.config["core"].get("remote")
    missing = [dep for dep in declared[name].paths("deps") if not Path(dep).exists()]
    # With a remote, DVC pulls what is missing.
    if missing and not remote:
        raise StageError(
            f"{', '.join(missing)}, which {name} reads, is missing too; recreate all of it with: "
            f"dvc repro {name}"
        )
    for out in outs:
        for file in damaged(cache, out.md5):
            tell(f"repair: {file} was damaged, deleted")
            file.unlink()
    for out in outs:
        path = Path(out.path)
        tell(f"repair: recreating {path}")
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", name]
    return subprocess.call(command + (["--pull"] if remote else []))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", help="as dvc.yaml names it")
    try:
        sys.exit(repair(parser.parse_args().stage))
    except StageError as error:
        sys.exit(on_screen(f"repair: {error}"))


if __name__ == "__main__":
    main()
