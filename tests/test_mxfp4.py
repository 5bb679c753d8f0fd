"""gpt-oss as downloaded: its experts stay in MXFP4 and equal those of transformers."""

import pytest
import torch
from moe import moe_config, to_mxfp4
from safetensors.torch import load_file, save_file
from test_experts import computed
from test_vram import run_of
from tiny import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from stages.fetching.model_files import check_config
from stages.quantize import link, quantize
from stages.quantizing.names import check_names
from stages.shared import packed
from stages.shared.base_bytes import expert_bytes, weights_bytes
from stages.shared.model import load_base
from stages.shared.mxfp4 import decoded
from stages.shared.process import StageError
from stages.shared.scored_model import model_sizes
from stages.shared.vram import sizes_of
from stages.shared.weights import Weights, other_names
from stages.shared.workload import shape_of

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
STACK = "model.layers.1.mlp.experts"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_value_is_that_of_transformers(dtype):
    """All bytes, with all scales that are numbers."""
    every = torch.arange(256, dtype=torch.uint8)
    blocks = every.view(1, 1, 16, 16).expand(3, 255, -1, -1).contiguous()
    scales = torch.arange(255, dtype=torch.uint8).view(1, 255, 1).expand(3, -1, 16).contiguous()
    found = decoded(blocks, scales, dtype).mT
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    assert torch.equal(found, expected)
    assert found.dtype == dtype


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt_oss")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(moe_config("gpt_oss"), dtype=torch.bfloat16).save_pretrained(
        folder
    )
    to_mxfp4(folder)
    return folder


def reference(base):
    """Dequantized by transformers."""
    return AutoModelForCausalLM.from_pretrained(
        base, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    ).float()


@pytest.mark.parametrize(("checkpointing", "at_once"), [(False, 1), (True, 4)])
def test_it_computes_what_dequantized_experts_do(
    base, checkpointing, at_once, tmp_path, monkeypatch
):
    link(base, tmp_path)
    monkeypatch.setattr(packed, "CHUNK_BYTES", 4 * at_once * 2 * 64 * 64)
    found = computed(load_base(tmp_path, CPU), checkpointing)
    expected = computed(reference(base), checkpointing)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_its_bytes_are_kept_and_read_as_one_tensor(base, tmp_path, capsys):
    quantize(base, tmp_path, double_quant=True)
    assert "are in MXFP4 already, and stay so to the bit" in capsys.readouterr().out
    stored, out = (load_file(f / "model.safetensors") for f in (base, tmp_path))
    for tensor in ("gate_up", "down"):
        for part in ("blocks", "scales"):
            kept = out[f"{STACK}.{tensor}_packed.{part}"]
            assert torch.equal(kept, stored[f"{STACK}.{tensor}_proj_{part}"])
    expected = reference(base).get_parameter(f"{STACK}.gate_up_proj")
    for weights in (Weights(base, other_names(tmp_path)), Weights(tmp_path)):
        name = f"{STACK}.gate_up_proj"
        assert weights.shapes[name] == expected.shape
        assert weights.key(name) == name
        read = weights.reader(name, CPU)
        assert torch.equal(torch.cat([read(slice(0, 1)), read(slice(1, 4))]), expected)


@pytest.mark.parametrize(("kind", "method"), [("nf4", "qlora"), ("none", "lora")])
def test_plan_counts_its_bytes(base, kind, method, tmp_path):
    if kind == "nf4":
        quantize(base, tmp_path, double_quant=True)
    else:
        link(base, tmp_path)
    shape = shape_of(AutoConfig.from_pretrained(base))
    assert shape == shape_of(AutoConfig.from_pretrained(tmp_path))
    stored = load_file(tmp_path / "model.safetensors").items()
    packed_bytes = sum(tensor.nbytes for name, tensor in stored if "_packed." in name)
    assert packed_bytes == expert_bytes(shape, method, double_quant=True)
    plain = shape_of(moe_config("gpt_oss"))
    saved = weights_bytes(plain, method, True) - weights_bytes(shape, method, True)
    assert saved == expert_bytes(plain, method, True) - packed_bytes
    sizes = sizes_of(shape, run_of(shape, method=method))
    # What can be streamed is a part of what is there.
    assert packed_bytes / 2 < sizes.layers * sizes.layer_weights < sizes.weights


def test_scoring_counts_its_bytes_without_nf4_too(base, tmp_path):
    link(base, tmp_path)
    held = sum(t.nbytes for _, t in load_base(tmp_path, CPU).named_parameters())
    held += sum(
        t.nbytes
        for name, t in load_file(tmp_path / "model.safetensors").items()
        if name.endswith("scales")
    )
    assert model_sizes(tmp_path, 80, CPU).weights == pytest.approx(held, rel=0.01)
    dense = model_sizes(tmp_path, 80, CPU, dense=True).weights
    assert dense == 4 * shape_of(AutoConfig.from_pretrained(base)).parameters


def test_blocks_of_another_shape_are_refused(base, tmp_path):
    (tmp_path / "out").mkdir()
    tensors = load_file(base / "model.safetensors")
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    key = f"{STACK}.down_proj_blocks"
    save_file(tensors | {key: tensors[key][:, :32].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(StageError, match=r"down_proj_blocks is \(4, 32, 2, 16\) in the files and"):
        quantize(tmp_path, tmp_path / "out", double_quant=True)
    tensors.pop(key)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(StageError, match=r"the files lack .*experts.down_proj of the model"):
        quantize(tmp_path, tmp_path / "out", double_quant=True)


@pytest.mark.parametrize("part", ["blocks", "scales"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.bfloat16], ids=str)
def test_parts_of_another_type_are_refused(base, tmp_path, part, dtype):
    tensors = load_file(base / "model.safetensors")
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    key = f"{STACK}.down_proj_{part}"
    save_file(tensors | {key: tensors[key].to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(StageError, match=rf"down_proj_{part} is \w+ and not U8, as MXFP4 is"):
        check_names(tmp_path)


def test_experts_that_are_there_twice_are_refused(base, tmp_path):
    tensors = load_file(base / "model.safetensors")
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    blocks = tensors[f"{STACK}.down_proj_blocks"]
    dense = torch.zeros(len(blocks), blocks.shape[2] * 32, blocks.shape[1], dtype=torch.bfloat16)
    save_file(tensors | {f"{STACK}.down_proj": dense}, tmp_path / "model.safetensors")
    with pytest.raises(StageError, match=r"have \S+down_proj both as it is and in MXFP4; remove"):
        check_names(tmp_path)


def test_no_other_quantized_model_is_taken(base, tmp_path):
    make_tokenizer(tmp_path)
    text = (base / "config.json").read_text()
    (tmp_path / "config.json").write_text(text)
    check_config(tmp_path, "owner/model")
    (tmp_path / "config.json").write_text(text.replace('"mxfp4"', '"fp8"'))
    with pytest.raises(StageError, match=r"quantized already \(fp8\); choose its 16-bit original"):
        check_config(tmp_path, "owner/model")
