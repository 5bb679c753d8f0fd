"""Is an adapter one of this base? Its shapes would fit every other model of the family too."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from stages.shared.outputs import read_json
from stages.shared.process import StageError, sha256

# What an adapter of this pipeline names when its base has no id of the Hub.
HERE = "models/base"


def check_named_base(adapter: Path, base: Path) -> None:
    """Refuse an adapter that names another base model, unless that has the same weights.

    `base` is a folder with the base's source.json. Raises StageError.
    """
    config, source = read_json(adapter / "adapter_config.json"), read_json(base / "source.json")
    named, revision = config.get("base_model_name_or_path"), config.get("revision")
    own = source["id"] if source["source"] == "hub" else HERE
    moved = re.fullmatch("[0-9a-f]{40}", str(revision)) and revision != source["commit"]
    if not named or (named in (own, source["id"]) and not moved):
        return
    files = source["files"].items()
    weights = {digest for name, digest in files if name.endswith(".safetensors")}
    folder = _found(named, revision)
    if folder and weights == {sha256(file) for file in folder.glob("*.safetensors")}:
        print(f"{adapter} was trained on {named}, which has the weights of {source['id']}")
        return
    where = f"{named} at {revision}" if moved else named
    raise StageError(
        f"{adapter}/adapter_config.json: trained on {where}, and the base is {source['id']}; take "
        f"that as model.id, or, if both have the same weights, say so there: "
        f'"base_model_name_or_path": "{own}", "revision": null, then: '
        "dvc commit --force train && dvc repro"
    )


def _found(named: str, revision: str | None) -> Path | None:
    """The folder of a model that is on this machine: a path, or in the Hugging Face cache."""
    if Path(named).is_dir():
        return Path(named)
    try:
        return Path(snapshot_download(named, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
