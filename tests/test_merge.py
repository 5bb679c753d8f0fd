from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from stages import merge as stage
from stages.shared.weights import Weights
from tests.merging import in_memory, make_sources, tensors
from tests.tiny import ROOT

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def run(root: Path, monkeypatch, **merge) -> Path:
    """The stage's main() in `root` with these merge params; gives models/merged."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["merge"] |= merge
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(root)
    stage.main()
    return root / "models/merged"


SOURCES = {
    "llama": {"arch": "llama"},
    "sharded": {"arch": "llama", "max_shard_size": "60KB", "tie_word_embeddings": False},
    "mistral": {"arch": "mistral", "lora": {"use_rslora": True, "r": 3}},
    "qwen2": {
        "arch": "qwen2",
        "lora": {
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
            "alpha_pattern": {"q_proj": 5},
        },
    },
    "gemma": {"arch": "gemma", "lora": {"target_modules": ["q_proj", "v_proj"]}},
    "sixteen": {"arch": "llama", "nf4": False},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """One folder for each of SOURCES, made when first asked for."""
    made = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make_sources(tmp_path_factory.mktemp(name), **SOURCES[name])
        return made[name]

    return get


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["dequantized", "original"])
@pytest.mark.parametrize("name", SOURCES)
def test_equals_pefts_merge_in_memory(name, kind, dtype, sources, monkeypatch):
    root = sources(name)
    merged = run(root, monkeypatch, base=kind, dtype=dtype)
    expected = in_memory(root / "models", kind, DTYPES[dtype])
    found = tensors(merged)
    base = Weights(root / "models/base")
    assert sorted(found) == base.names
    for key, tensor in found.items():
        assert tensor.dtype == DTYPES[dtype], key
        assert torch.equal(tensor, expected[key]), key
    assert Weights(merged).index == base.index
    _, info = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not any(info.values()), info
