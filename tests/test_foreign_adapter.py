"""An adapter trained by PEFT elsewhere goes through every stage after train."""

import json
import shutil
from pathlib import Path

import pytest
from merging import edit_json, edit_tensors, make_adapter
from quick import Stage, run

pytestmark = pytest.mark.slow

AFTER = ["evaluate", "merge", "verify", "export"]


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign") / "project"
    shutil.copytree(finished, folder)
    (folder / "own").mkdir()
    for file in ("metrics/report.md", "metrics/summary.json", "models/release/README.md"):
        shutil.move(folder / file, folder / "own" / Path(file).name)
    adapter = folder / "models/adapter"
    shutil.rmtree(adapter)
    make_adapter(folder / "models/base", adapter, target_modules=["q_proj", "v_proj"])
    for file in adapter.iterdir():
        if not file.name.startswith("adapter_"):
            file.unlink()
    for name in AFTER:
        run(name, folder)
    return folder


def test_it_is_scored_merged_and_verified(folder):
    evaluated = json.loads((folder / "metrics/eval.json").read_text())
    verified = json.loads((folder / "metrics/verify.json").read_text())
    assert verified["adapter_perplexity"] == pytest.approx(evaluated["tuned_perplexity"], rel=1e-3)
    assert json.loads((folder / "models/merged/merge.json").read_text())["updated_tensors"] == 4
    assert (folder / "models/release/tokenizer.json").exists()


def test_the_report_does_not_say_that_it_was_trained_here(folder):
    loss = f"{json.loads((folder / 'metrics/train.json').read_text())['train_loss']:.4g}"
    for name in ("metrics/report.md", "models/release/README.md"):
        own = (folder / "own" / Path(name).name).read_text()
        found = (folder / name).read_text()
        for claim in (loss, "tuned on", "What was trained on what", "Trainable parameters"):
            assert claim in own, claim
            assert claim not in found, claim
        assert "was not trained by this pipeline" in found
    own = json.loads((folder / "own/summary.json").read_text())
    found = json.loads((folder / "metrics/summary.json").read_text())
    assert own.keys() - found.keys() == {
        "train_minutes",
        "ram_gb",
        "predicted_vram_gb",
        "fits_gpus",
    }


def test_an_edited_one_is_none_of_this_run(finished, tmp_path):
    """Its factors are those that train wrote, but they count ten times as much."""
    folder = tmp_path / "project"
    shutil.copytree(finished, folder)
    adapter = folder / "models/adapter"
    alpha = json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"]
    edit_json(adapter / "adapter_config.json", lora_alpha=10 * alpha)
    (adapter / "SHA256SUMS").unlink()
    for name in AFTER[1:]:
        run(name, folder)
    for name in ("metrics/report.md", "models/release/README.md"):
        own, found = ((each / name).read_text() for each in (finished, folder))
        for claim in ("tuned on", "Update scale"):
            assert claim in own, claim
            assert claim not in found, claim
        assert "was not trained by this pipeline" in found


def test_a_damaged_one_is_refused_in_one_line(folder):
    """The last test with this folder."""
    edit_tensors(
        folder / "models/adapter/adapter_model.safetensors",
        lambda t: t.pop("base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"),
    )
    stage = Stage("evaluate", folder)
    assert stage.wait() == 1
    assert stage.said.splitlines()[-1] == (
        "evaluate: models/adapter: model.layers.1.self_attn.q_proj: lora_A is missing; the "
        "adapter is incomplete"
    )
