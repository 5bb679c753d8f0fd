"""Quantizing tensor by tensor gives the bytes of transformers' own quantized checkpoint."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stages import quantize as stage
from stages.quantize import link, quantization_config, quantize
from stages.shared.model import load_base, set_compute_dtype
from stages.shared.process import StageError
from tests.tiny import make_model

CPU = torch.device("cpu")


def quantized_by_transformers(base, out, double_quant):
    model = AutoModelForCausalLM.from_pretrained(
        base,
        quantization_config=quantization_config(double_quant),
        device_map={"": "cpu"},
        dtype=torch.bfloat16,
    )
    model.save_pretrained(out)


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "gemma"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_tensors_equal_those_of_transformers(tmp_path, arch, double_quant):
    make_model(tmp_path / "base", arch)
    quantized_by_transformers(tmp_path / "base", tmp_path / "theirs", double_quant)
    (tmp_path / "ours").mkdir()
    quantize(tmp_path / "base", tmp_path / "ours", double_quant)
    ours = load_file(tmp_path / "ours/model.safetensors")
    theirs = load_file(tmp_path / "theirs/model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    configs = [
        json.loads((tmp_path / side / "config.json").read_text())["quantization_config"]
        for side in ("ours", "theirs")
    ]
    assert configs[0] == configs[1]


def test_shards_are_bounded_and_load_to_the_same_model(tmp_path, monkeypatch):
    make_model(tmp_path / "base", max_shard_size="60KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    for name, limit in (("whole", 10**9), ("sharded", 20_000)):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(stage, "SHARD_BYTES", limit)
        quantize(tmp_path / "base", tmp_path / name, double_quant=True)
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    ids = torch.arange(3, 40)[None]
    logits = [load_base(tmp_path / n, CPU)(ids).logits for n in ("whole", "sharded")]
    assert torch.equal(*logits)


def test_two_runs_write_the_same_bytes(tmp_path):
    make_model(tmp_path / "base")
    sums = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        quantize(tmp_path / "base", tmp_path / name, double_quant=True)
        data = b"".join(p.read_bytes() for p in sorted((tmp_path / name).iterdir()))
        sums.append(hashlib.sha256(data).hexdigest())
    assert sums[0] == sums[1]


def test_a_weight_that_is_not_in_the_files_is_named(tmp_path):
    make_model(tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    config["num_hidden_layers"] = 3
    config.pop("layer_types", None)
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    (tmp_path / "out").mkdir()
    with pytest.raises(StageError, match=r"model\.layers\.2\.mlp\.down_proj\.weight"):
        quantize(tmp_path / "base", tmp_path / "out", double_quant=True)


def test_without_quantization_the_weights_are_those_of_the_base(tmp_path):
    make_model(tmp_path / "base", max_shard_size="60KB")
    (tmp_path / "out").mkdir()
    link(tmp_path / "base", tmp_path / "out")
    ids = torch.arange(3, 40)[None]
    logits = [load_base(tmp_path / n, CPU)(ids).logits for n in ("base", "out")]
    assert torch.equal(*logits)


def test_a_reloaded_model_computes_in_the_dtype_asked_for(tmp_path):
    # A pre-quantized folder ignores dtype=; in bfloat16 the CPU is 10 to 30 times slower.
    make_model(tmp_path / "base")
    (tmp_path / "out").mkdir()
    quantize(tmp_path / "base", tmp_path / "out", double_quant=True)
    model = load_base(tmp_path / "out", CPU)
    linears = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    assert len(linears) == 14
    assert {m.compute_dtype for m in linears} == {torch.float32}
    rest = {p.dtype for n, p in model.named_parameters() if "proj" not in n}
    assert rest == {torch.float32}
    assert not any(m.support_avx512bf16_for_cpu for m in linears)
    set_compute_dtype(model, torch.bfloat16)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
