"""Make a stage's outputs anew when a file of theirs is damaged.

    python -m tools.repair quantize

DVC never looks again at what its cache holds, and would put a damaged file back over the new
one. So what dvc.lock records for the stage is hashed first, and damaged objects are thrown away.
What the cache or a remote still has is taken from there; otherwise the stage runs.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

from dvc.repo import Repo
from ruamel.yaml import YAML


def objects(cache: Path, outs: list[dict]) -> list[Path]:
    """The files of DVC's cache that `outs` of dvc.lock consist of, folders' lists first."""
    found = [_object(cache, out["md5"]) for out in outs]
    for listing in found.copy():
        if listing.suffix == ".dir" and listing.exists() and not is_damaged(listing):
            entries = json.loads(listing.read_text(encoding="utf-8"))
            found += [_object(cache, entry["md5"]) for entry in entries]
    return found


def is_damaged(file: Path) -> bool:
    """Whether an object (00/1122…, named by its MD5) holds something else than its name says."""
    with file.open("rb") as content:
        actual = hashlib.file_digest(content, "md5").hexdigest()
    return actual != (file.parent.name + file.name).removesuffix(".dir")


def read(path: Path) -> dict:
    """The stages of dvc.yaml or dvc.lock."""
    return YAML(typ="safe").load(path)["stages"]


def _object(cache: Path, md5: str) -> Path:
    return cache / md5[:2] / md5[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", help="as dvc.yaml names it")
    stage = parser.parse_args().stage
    recorded = read(Path("dvc.lock"))
    if stage not in recorded:
        sys.exit(f"repair: dvc.lock has no stage {stage}; it has {', '.join(recorded)}")
    declared = read(Path("dvc.yaml"))[stage]
    # Metrics and plots are in git and have no object.
    entries = declared.get("outs", [])
    cached = {entry if isinstance(entry, str) else next(iter(entry)) for entry in entries}
    outs = [out for out in recorded[stage]["outs"] if out["path"] in cached]
    with Repo() as repo:
        cache, remote = Path(repo.cache.local.path), repo.config["core"].get("remote")
    missing = [dep for dep in declared["deps"] if not Path(dep).exists()]
    # With a remote, DVC pulls what is missing.
    if missing and not remote:
        sys.exit(
            f"repair: {', '.join(missing)}, which {stage} reads, is missing too; make all of it "
            f"with: dvc repro {stage}"
        )
    for file in objects(cache, outs):
        if file.exists() and is_damaged(file):
            print(f"repair: {file} is damaged, thrown away", flush=True)
            file.unlink()
    for out in outs:
        path = Path(out["path"])
        print(f"repair: {path} is made anew", flush=True)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", stage]
    sys.exit(subprocess.call(command + (["--pull"] if remote else [])))


if __name__ == "__main__":
    main()
