"""An adapter and the base that it names."""

import json
from pathlib import Path

import pytest

from stages.shared import named_base
from stages.shared.named_base import check_named_base
from stages.shared.process import StageError, sha256

COMMIT, OTHER = "a" * 40, "b" * 40
HUB = {"source": "hub", "id": "org/model", "commit": COMMIT}
LOCAL = {"source": "local", "id": "/disk/model", "commit": None}


def make(folder: Path, source: dict, weights: str = "weights", **named) -> None:
    """An adapter that names a base, and a base of these weights."""
    for name in ("base", "adapter"):
        (folder / name).mkdir()
    file = folder / "base/model.safetensors"
    file.write_text(weights)
    files = {"config.json": "0" * 64, file.name: sha256(file)}
    (folder / "base/source.json").write_text(json.dumps(source | {"files": files}))
    (folder / "adapter/adapter_config.json").write_text(json.dumps(named))


@pytest.mark.parametrize(
    ("source", "named", "revision"),
    [
        (HUB, "org/model", COMMIT),
        (HUB, "org/model", "main"),
        (HUB, "org/model", None),
        (HUB, None, None),
        (LOCAL, "models/base", None),
        (LOCAL, "/disk/model", None),
    ],
)
def test_its_own_base_is_taken(source, named, revision, tmp_path):
    make(tmp_path, source, base_model_name_or_path=named, revision=revision)
    check_named_base(tmp_path / "adapter", tmp_path / "base")


@pytest.mark.parametrize(
    ("source", "named", "revision", "said"),
    [
        (
            HUB,
            "org/other",
            None,
            "trained on org/other, but the base is org/model; use the former as",
        ),
        (HUB, "org/model", OTHER, f"trained on org/model at {OTHER}, but the base is org/model"),
        (HUB, "models/base", None, '"base_model_name_or_path": "org/model", "revision": null'),
        (LOCAL, "org/model", None, '"base_model_name_or_path": "models/base", "revision": null'),
        (LOCAL, "/no/such folder", None, "trained on /no/such folder, but"),
    ],
)
def test_another_is_refused_in_one_line(source, named, revision, said, tmp_path):
    make(tmp_path, source, base_model_name_or_path=named, revision=revision)
    with pytest.raises(StageError) as error:
        check_named_base(tmp_path / "adapter", tmp_path / "base")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_hashes_say_that_another_name_is_the_same_model(same, cached, tmp_path, monkeypatch):
    """In a folder, or in the Hugging Face cache."""
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "model.safetensors").write_text("weights" if same else "tuned weights")
    named = "org/mirror" if cached else str(copy)
    monkeypatch.setattr(named_base, "snapshot_download", lambda *_, **__: str(copy))
    make(tmp_path, HUB, base_model_name_or_path=named)
    if same:
        check_named_base(tmp_path / "adapter", tmp_path / "base")
    else:
        with pytest.raises(StageError, match=f"trained on {named}"):
            check_named_base(tmp_path / "adapter", tmp_path / "base")
