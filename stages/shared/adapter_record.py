"""Which adapter it is. train and merge record it, so that later stages know one of this run."""

from pathlib import Path

from stages.shared.process import sha256

# Key of a record -> file. Together they decide what an adapter adds to the base.
_FILES = {
    "adapter_config_sha256": "adapter_config.json",
    "adapter_sha256": "adapter_model.safetensors",
}


def adapter_record(folder: Path) -> dict[str, str]:
    """Key -> SHA-256 of the adapter's files in `folder`."""
    return {key: sha256(folder / name) for key, name in _FILES.items()}


def split_record(cost: dict) -> tuple[dict, dict]:
    """The adapter's record in metrics/train_cost.json, and the rest of it."""
    record = {key: cost[key] for key in _FILES if key in cost}
    return record, {key: value for key, value in cost.items() if key not in record}


def trained_here(record: dict, cost: dict) -> bool:
    """Whether the adapter of `record` is the one that train wrote with `cost`, the content of
    metrics/train_cost.json. Older versions of train recorded no configuration."""
    trained, _ = split_record(cost)
    return "adapter_sha256" in trained and all(record.get(k) == v for k, v in trained.items())
