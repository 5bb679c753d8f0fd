"""The benchmark of cards on a tiny shape: its workspaces run through every stage."""

import json
import math

import pytest
from quick import run
from safetensors.torch import load_file
from transformers.models.llama import modeling_llama

from benchmarks import cards, random_models
from benchmarks.random_models import SHAPES, build, config_of, write_base
from stages.shared.workload import shape_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("recipe", ["mistral-7b-guanaco", "mistral-7b-fast"])
def test_a_recipe_runs_its_stages(tmp_path, monkeypatch, recipe):
    """With five of the twenty steps, and short answers."""
    source, folder = tmp_path / "tiny", tmp_path / recipe
    for name in ("ROWS", "LONG_ROWS", "HELD_OUT_ROWS"):
        monkeypatch.setattr(cards, name, getattr(cards, name) // 4)
    cards.copy_project(source)
    monkeypatch.chdir(source)
    cards.make_base("tiny")
    run("quantize", source)
    cards.make_workspace(recipe, source, folder, 24)
    params = folder / "params.yaml"
    params.write_text(params.read_text().replace("max_answer_tokens: 512", "max_answer_tokens: 16"))
    for stage in cards.STAGES:
        run(stage, folder)
    assert json.loads((folder / "metrics/train.json").read_text())["steps"] == 5
    managed = cards.planned(folder)["managed_gb"]
    assert (managed > 0) == (recipe == "mistral-7b-guanaco")


def test_the_written_weights_are_those_of_the_shape(tmp_path):
    count = write_base("tiny", tmp_path, random_models.torch.device("cpu"))
    assert count == shape_of(config_of("tiny")).parameters
    names = {}
    for file in tmp_path.glob("*.safetensors"):
        names |= dict.fromkeys(load_file(file), file.name)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert names == index["weight_map"]
    assert len(set(names.values())) > 1


def test_a_second_model_is_built_as_the_first_was(monkeypatch):
    def mlp():
        return type(build("tiny", True, random_models.torch.device("cpu")).model.layers[0].mlp)

    before = mlp()
    # As Liger does it, which runs on a GPU only: its own class in the module of the family.
    monkeypatch.setattr(modeling_llama, "LlamaMLP", type("LigerSwiGLUMLP", (before,), {}))
    assert mlp() is before


def test_every_step_has_rows_of_full_length():
    train, held_out = cards.random_rows(SHAPES["mistral-7b"].vocabulary, 2048)
    assert (len(train), len(held_out)) == (cards.ROWS, cards.HELD_OUT_ROWS)
    assert sum(len(row) == 2048 for row in train) >= cards.LONG_ROWS
    assert math.ceil(len(train) / 4) == 20
