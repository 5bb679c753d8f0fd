"""An adapter and the base that it names."""

import hashlib
import json
from pathlib import Path

import pytest

from stages.shared import named_base
from stages.shared.adapter_record import adapter_record
from stages.shared.named_base import check_named_base
from stages.shared.process import StageError, sha256

COMMIT, OTHER = "a" * 40, "b" * 40
HUB = {"source": "hub", "id": "org/model", "commit": COMMIT}
LOCAL = {"source": "local", "id": "/disk/model", "commit": None}
PYPI = {"source": "pypi", "id": "llm-model", "commit": None}


def hash_of(*contents: str) -> str:
    """What an adapter says of weights files with these contents."""
    lines = sorted(f"{hashlib.sha256(content.encode()).hexdigest()}\n" for content in contents)
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


OWN, FOREIGN = hash_of("weights"), hash_of("tuned weights")


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """The stages run in a project, whose models/base has the base's weights."""
    (tmp_path / "models/base").mkdir(parents=True)
    (tmp_path / "models/base/model.safetensors").write_text("weights")
    monkeypatch.chdir(tmp_path)


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
        (LOCAL, "models/base", OWN),
        (LOCAL, "./models/base/", OWN),
        (LOCAL, "/disk/model", None),
        (PYPI, "models/base", OWN),
        (HUB, "models/base", OWN),
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
        (
            HUB,
            "models/base",
            None,
            f'"base_model_name_or_path": "org/model", "revision": "{COMMIT}"',
        ),
        (
            LOCAL,
            "org/model",
            None,
            f'"base_model_name_or_path": "models/base", "revision": "{OWN}"',
        ),
        (LOCAL, "/no/such folder", None, "trained on /no/such folder, but"),
        (LOCAL, "models/base", None, "trained on models/base of unknown weights, but the base is"),
        (LOCAL, "./models/base/", None, "trained on models/base of unknown weights, but the base"),
        (LOCAL, "models/base", FOREIGN, "trained on models/base of other weights, but the base is"),
        (PYPI, "models/base", FOREIGN, "trained on models/base of other weights, but the base is"),
        (HUB, "models/base", FOREIGN, "trained on models/base of other weights, but the base is"),
    ],
)
def test_another_is_refused_in_one_line(source, named, revision, said, tmp_path):
    make(tmp_path, source, base_model_name_or_path=named, revision=revision)
    with pytest.raises(StageError) as error:
        check_named_base(tmp_path / "adapter", tmp_path / "base")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_this_projects_folder_is_not_taken_for_the_named_one(tmp_path):
    """By whatever path: it may have another model since."""
    make(tmp_path, LOCAL, base_model_name_or_path=str(Path("models/base").absolute()))
    with pytest.raises(StageError, match="trained on models/base of unknown weights"):
        check_named_base(tmp_path / "adapter", tmp_path / "base")


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


def test_the_hash_is_of_all_weights_files_and_of_no_other():
    files = {"config.json": "0" * 64}
    for number, content in enumerate(("one", "two", "three")):
        digest = hashlib.sha256(content.encode()).hexdigest()
        files[f"model-{number}.safetensors"] = digest
    said = named_base.named_base(LOCAL | {"files": files})
    assert said == {
        "base_model_name_or_path": "models/base",
        "revision": hash_of("one", "two", "three"),
    }


def test_a_folder_without_weights_is_no_base(tmp_path):
    (tmp_path / "docs").mkdir()
    make(tmp_path, LOCAL, base_model_name_or_path="docs")
    source = LOCAL | {"files": {"model.bin": "0" * 64}}
    (tmp_path / "base/source.json").write_text(json.dumps(source))
    with pytest.raises(StageError, match="trained on docs"):
        check_named_base(tmp_path / "adapter", tmp_path / "base")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_older_versions_named_no_weights(name, tmp_path):
    """Their adapter is taken in the project that trained it, unless it was changed."""
    make(tmp_path, LOCAL, base_model_name_or_path="models/base", revision=None)
    adapter, cost = tmp_path / "adapter", tmp_path / "metrics/train_cost.json"
    (adapter / "adapter_model.safetensors").write_text("factors")
    cost.parent.mkdir()
    cost.write_text(json.dumps({"adapter_sha256": sha256(adapter / "adapter_model.safetensors")}))
    check_named_base(adapter, tmp_path / "base")
    cost.write_text(json.dumps(adapter_record(adapter)))
    check_named_base(adapter, tmp_path / "base")
    with (adapter / name).open("a") as file:
        file.write(" ")
    with pytest.raises(StageError, match="unknown weights"):
        check_named_base(adapter, tmp_path / "base")


def test_what_names_other_weights_is_refused_even_where_it_was_trained(tmp_path):
    make(tmp_path, LOCAL, base_model_name_or_path="models/base", revision=FOREIGN)
    (tmp_path / "adapter/adapter_model.safetensors").write_text("factors")
    (tmp_path / "metrics").mkdir()
    record = adapter_record(tmp_path / "adapter")
    (tmp_path / "metrics/train_cost.json").write_text(json.dumps(record))
    with pytest.raises(StageError, match="other weights"):
        check_named_base(tmp_path / "adapter", tmp_path / "base")


def test_what_it_tells_to_write_is_taken(tmp_path):
    make(tmp_path, LOCAL, base_model_name_or_path="models/base", revision=FOREIGN)
    adapter = tmp_path / "adapter"
    (adapter / "SHA256SUMS").touch()
    with pytest.raises(StageError) as error:
        check_named_base(adapter, tmp_path / "base")
    written, rest = str(error.value).split("into that file: ")[1].split(", delete ")
    assert rest.startswith(f"{adapter}/SHA256SUMS, then: dvc commit")
    (adapter / "adapter_config.json").write_text("{" + written + "}")
    check_named_base(adapter, tmp_path / "base")
