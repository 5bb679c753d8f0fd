"""Checks that an adapter belongs to this base; its shapes would fit the whole model family."""

import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download

from stages.shared.foreign import Foreign, held_to, read_object
from stages.shared.outputs import read_json
from stages.shared.process import StageError, sha256
from stages.shared.screen import on_screen, tell

# The base name in this pipeline's adapters if the base has no Hub id.
HERE = "models/base"


class Named(Foreign):
    base_model_name_or_path: str | None = None
    revision: str | None = None


def check_named_base(adapter: Path, base: Path) -> None:
    """Raise StageError if the adapter names another base model, unless that has the same weights.

    `base` is a folder with the base's source.json.
    """
    path = adapter / "adapter_config.json"
    config, source = held_to(Named, read_object(path), str(path)), read_json(base / "source.json")
    named, revision = config.base_model_name_or_path, config.revision
    own = source["id"] if source["source"] == "hub" else HERE
    moved = re.fullmatch("[0-9a-f]{40}", str(revision)) and revision != source["commit"]
    if not named or (named in (own, source["id"]) and not moved):
        return
    files = source["files"].items()
    weights = {digest for name, digest in files if name.endswith(".safetensors")}
    folder = _found(named, revision)
    if folder and weights == {sha256(file) for file in folder.glob("*.safetensors")}:
        tell(f"{adapter} was trained on {named}, which has the same weights as {source['id']}")
        return
    where = on_screen(f"{named} at {revision}" if moved else named, 200)
    raise StageError(
        f"{path}: trained on {where}, but the base is {source['id']}; use "
        f"the former as model.id, or, if both have the same weights, write into that file: "
        f'"base_model_name_or_path": "{own}", "revision": null, then: '
        "dvc commit --force train && dvc repro"
    )


def _found(named: str, revision: str | None) -> Path | None:
    """The folder of a model on this machine: a path, or in the Hugging Face cache."""
    # Not Path's method: a name can be too long for the system.
    if os.path.isdir(named):
        return Path(named)
    try:
        return Path(snapshot_download(named, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # missing, or not a model's name
        return None
