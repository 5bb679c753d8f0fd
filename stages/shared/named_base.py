"""Checks that an adapter belongs to this base; its shapes would fit the whole model family."""

import hashlib
import json
import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download

from stages.shared.adapter_record import adapter_record, trained_here
from stages.shared.foreign import Foreign, held_to, read_object
from stages.shared.outputs import SUMS, read_json
from stages.shared.process import StageError, sha256
from stages.shared.screen import on_screen, tell

# The base name in this pipeline's adapters if the base has no Hub id: any project's.
HERE = "models/base"
# Later stages do not depend on it: it decides whether an adapter is taken, and changes no output.
COST = Path("metrics/train_cost.json")


class Named(Foreign):
    base_model_name_or_path: str | None = None
    revision: str | None = None


def named_base(source: dict) -> dict[str, str]:
    """What an adapter's configuration says of its base; `source` as in the base's source.json.

    PEFT ignores the revision of a folder, so it has the hash of the weights.
    """
    if source["source"] == "hub":
        return {"base_model_name_or_path": source["id"], "revision": source["commit"]}
    return {"base_model_name_or_path": HERE, "revision": _weights_hash(source)}


def check_named_base(adapter: Path, base: Path) -> None:
    """Raise StageError if the adapter names another base model, unless that has the same weights.

    `base` is a folder with the base's source.json.
    """
    path = adapter / "adapter_config.json"
    config, source = held_to(Named, read_object(path), str(path)), read_json(base / "source.json")
    named, revision = config.base_model_name_or_path, config.revision
    if not named:
        return
    if os.path.realpath(named) == os.path.realpath(HERE):
        # Never this project's folder, which has whatever base is chosen now.
        recorded = re.fullmatch("sha256:[0-9a-f]{64}", str(revision))
        if revision == _weights_hash(source) or (not recorded and _made_here(adapter)):
            return
        where = f"{HERE} of {'other' if recorded else 'unknown'} weights"
        former = "the model that was there then"
    else:
        moved = re.fullmatch("[0-9a-f]{40}", str(revision)) and revision != source["commit"]
        if named == source["id"] and not moved:
            return
        folder, weights = _found(named, revision), _weights(source)
        if folder and weights and weights == {sha256(f) for f in folder.glob("*.safetensors")}:
            tell(f"{adapter} was trained on {named}, which has the same weights as {source['id']}")
            return
        where = on_screen(f"{named} at {revision}" if moved else named, 200)
        former = "the former"
    right = json.dumps(named_base(source))[1:-1]
    unlisted = f", delete {adapter / SUMS}" if (adapter / SUMS).exists() else ""
    raise StageError(
        f"{path}: trained on {where}, but the base is {source['id']}; use "
        f"{former} as model.id, or, if both have the same weights, write into that file: "
        f"{right}{unlisted}, then: "
        "dvc commit --force train && dvc repro"
    )


def _weights(source: dict) -> set[str]:
    """The SHA-256 of the base's weights files."""
    return {digest for name, digest in source["files"].items() if name.endswith(".safetensors")}


def _weights_hash(source: dict) -> str:
    """As of: sha256sum models/base/*.safetensors | cut -c -64 | sort -u | sha256sum"""
    lines = "".join(f"{digest}\n" for digest in sorted(_weights(source)))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def _made_here(adapter: Path) -> bool:
    """Whether this project trained it. Older versions of train did not record the base."""
    return COST.exists() and trained_here(adapter_record(adapter), read_json(COST))


def _found(named: str, revision: str | None) -> Path | None:
    """The folder of a model on this machine: a path, or in the Hugging Face cache."""
    # Not Path's method: a name can be too long for the system.
    if os.path.isdir(named):
        return Path(named)
    try:
        return Path(snapshot_download(named, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # missing, or not a model's name
        return None
