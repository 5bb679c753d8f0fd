"""Each recipe is valid and runs end to end with its model and data swapped for tiny ones."""

import json
import shutil

import pytest
import yaml
from moe import MOE, to_mxfp4
from quick import Stage
from tiny import CHATML, ROOT, make_model, make_tokenizer, make_workspace

from stages.shared.params import faults

pytestmark = pytest.mark.slow

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
STAGES = [
    "fetch_model",
    "fetch_data",
    "fetch_retention",
    "prepare",
    "plan",
    "quantize",
    "train",
    "evaluate",
    "merge",
    "verify",
    "export",
]
# Families of the models, by how a recipe's name begins where that is not the family's.
FAMILIES = {"gpt-oss": "gpt_oss", "qwen-3": "qwen3_moe", "qwen": "qwen2", "smollm2": "llama"}
CHATTY = ("gemma", "gpt-oss", "qwen", "smollm2")
# Values that must be small for the test; all others are the recipe's own.
SMALL = {
    "model": {"source": "local", "id": "tiny", "revision": None},
    "dataset": {"source": "local", "id": "data/source/rows.jsonl", "revision": None},
    "prepare": {"eval_rows": 8, "max_length": 256, "group_by": None},
    "evaluate": {"samples": 2, "max_answer_tokens": 16},
}


def make_rows(path, form):
    """Like the recipes' data: in Llama-2's template (guanaco), or conversations (FineTome)."""
    asked = [(f"What is item {i}?", f"It stands in box {i % 7}.") for i in range(40)]
    rows = [
        {"text": f"<s>[INST] {question} [/INST] {answer} </s>"}
        if form == "rendered"
        else {
            "conversations": [
                {"from": "human", "value": question},
                {"from": "gpt", "value": answer},
            ],
            "source": "tests",
            "score": 5.0,
        }
        for question, answer in asked
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def mix_local(params: dict, source):
    """Put text files into the folder `source` where the recipe mixes further sources."""
    for number, entry in enumerate(params["dataset"]["mix"] or []):
        file = source / f"general-{number}.jsonl"
        file.write_text("".join(f'{{"text": "Night {i} fell."}}\n' for i in range(30)))
        entry |= {"source": "local", "id": f"data/source/{file.name}", "revision": None}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs_end_to_end(recipe, tmp_path):
    text = recipe.read_text()
    assert faults(text) == []
    folder = make_workspace(tmp_path / "project")
    shutil.rmtree(folder / "tiny")
    params = yaml.safe_load(text)
    form, begins = params["prepare"]["format"], recipe.stem.startswith
    family = next((FAMILIES[x] for x in FAMILIES if begins(x)), recipe.stem.split("-")[0])
    # As the models of the recipes: a BOS, Llama's names of the projections, and a chat template
    # where the model has its own.
    make_tokenizer(folder / "tiny", chat_template=CHATML if begins(CHATTY) else None)
    make_model(folder / "tiny", family, **MOE.get(family, {}))
    if family == "gpt_oss":
        to_mxfp4(folder / "tiny")
    make_rows(folder / "data/source/rows.jsonl", form)
    mix_local(params, folder / "data/source")
    for section, values in SMALL.items():
        params[section] |= values
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    for name in STAGES:
        stage = Stage(name, folder)
        assert stage.wait() == 0, (name, stage.log.read_text())
    targets = json.loads((folder / "models/adapter/adapter_config.json").read_text())
    wanted = params["lora"]["target_modules"]
    assert wanted == "all-linear" or targets["target_modules"] == sorted(wanted)
    assert targets["r"] == params["lora"]["r"]
    evaluated = json.loads((folder / "metrics/eval.json").read_text())
    assert evaluated["tuned_perplexity"] < evaluated["base_perplexity"]
    scored = [key for key in evaluated if key.startswith("source_") and "tuned_perplexity" in key]
    assert len(scored) == 3 * len(params["dataset"]["mix"] or [])
    assert (folder / "models/release/model.safetensors").exists()
