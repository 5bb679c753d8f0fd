"""Quantizing tensor by tensor gives the same bytes as transformers' own quantization."""

import hashlib
import json
import re
import shutil
from functools import partial

import pytest
import quick
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stages import quantize as stage
from stages.quantize import link, quantization_config, quantize
from stages.quantizing.names import check_types
from stages.shared.embeddings import has_own_head, names_of_embeddings
from stages.shared.model import load_base, set_compute_dtype
from stages.shared.process import StageError
from stages.shared.scored_model import decoder_in
from stages.shared.text_model import language_model, read_config
from stages.shared.weights import model_weights
from tests.tiny import make_model, make_tokenizer, make_workspace

pytestmark = pytest.mark.slow

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


def without(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def renamed(old, new):
    def rename(tensors):
        for name in list(tensors):
            tensors[re.sub(old, new, name)] = tensors.pop(name)

    return rename


def added(name):
    return lambda tensors: tensors.update({name: torch.ones(8)})


def retyped(name, dtype):
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


def cut(tensors):
    tensors["model.norm.weight"] = torch.ones(8)


# What is done to the tensors of a model, settings of its config.json, and what is said.
REFUSED = {
    "norm": (
        without("model.norm.weight"),
        {},
        "the files lack model.norm.weight of the model; the model is incomplete: name another",
    ),
    "embeddings": (
        without("model.embed_tokens.weight"),
        {},
        "the files lack lm_head.weight, model.embed_tokens.weight of the model; the model is incom",
    ),
    "head": (
        without("lm_head.weight"),
        {"tie_word_embeddings": False},
        "the files lack lm_head.weight of the model; if the model shares its embeddings, set "
        "tie_word_embeddings: true in the config.json of a copy, with model.source: local",
    ),
    "linear": (
        without("model.layers.1.mlp.up_proj.weight"),
        {},
        "the files lack model.layers.1.mlp.up_proj.weight of the model; the model is incomplete",
    ),
    "another prefix": (
        renamed("^", "language_model."),
        {},
        "the files lack lm_head.weight, model.embed_tokens.weight, model.layers.0.input_layernorm."
        "weight and 18 more of the model; they call model.embed_tokens.weight "
        "language_model.model.embed_tokens.weight: rename the tensors in a copy",
    ),
    "a name of packed experts": (
        added("x_packed.codes"),
        {},
        "x_packed.codes has a name that this pipeline gives to quantized weights; remove it from",
    ),
    "a name of an expert": (
        added("model.layers.1.mlp.experts.gate_up_proj.0.0"),
        {},
        "model.layers.1.mlp.experts.gate_up_proj.0.0 has a name that this pipeline gives to",
    ),
    "a name of NF4": (
        added("x.quant_state.bitsandbytes__nf4"),
        {},
        "x.quant_state.bitsandbytes__nf4 has a name that this pipeline gives to quantized weights",
    ),
    "a name that steers a screen": (
        added("\x1b[2J_packed.codes"),
        {},
        "\x1b[2J_packed.codes has a name that this pipeline gives to quantized weights; remove it",
    ),
    "whole numbers": (
        retyped("model.norm.weight", torch.int8),
        {},
        "model.norm.weight is I8, not a float type: the weights are quantized in a form that is",
    ),
    "shape": (cut, {}, "model.norm.weight is (8,) in the files and (64,) in config.json; one of"),
}


def edit_tensors(folder, edit):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("form", [lambda base, out: quantize(base, out, True), link])
@pytest.mark.parametrize(("edit", "settings", "said"), REFUSED.values(), ids=REFUSED)
def test_weights_that_would_be_made_up_are_refused(tmp_path, form, edit, settings, said):
    make_model(tmp_path / "base", **settings)
    edit_tensors(tmp_path / "base", edit)
    (tmp_path / "out").mkdir()
    with pytest.raises(StageError) as error:
        form(tmp_path / "base", tmp_path / "out")
    assert str(error.value).startswith(f"{tmp_path}/base: {said}")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("form", [lambda base, out: quantize(base, out, True), link])
def test_names_that_transformers_knows_better_are_kept_beside_the_weights(tmp_path, form):
    """As of a model that was saved without its head."""
    ids, logits = torch.arange(3, 40)[None], []
    for name, edit in (("whole", lambda _: None), ("backbone", renamed("^model\\.", ""))):
        make_model(tmp_path / name)
        edit_tensors(tmp_path / name, edit)
        out = tmp_path / f"{name}-out"
        out.mkdir()
        form(tmp_path / name, out)
        logits.append(load_base(out, CPU)(ids).logits)
    assert torch.equal(*logits)
    assert not (tmp_path / "whole-out/names.json").exists()
    names = json.loads((out / "names.json").read_text())
    assert names["model.norm.weight"] == "norm.weight"


def with_head(change):
    def add(tensors):
        head = tensors["model.embed_tokens.weight"].clone()
        head[-1, -1] += change
        tensors["lm_head.weight"] = head

    return add


@pytest.mark.parametrize("form", [lambda base, out: quantize(base, out, True), link])
def test_a_head_that_differs_from_the_embeddings_is_not_tied(tmp_path, form, capsys):
    """transformers 4 would tie it in the release."""
    make_model(tmp_path / "base")
    edit_tensors(tmp_path / "base", with_head(1.0))
    (tmp_path / "out").mkdir()
    form(tmp_path / "base", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    model = load_base(tmp_path / "out", CPU)
    assert names_of_embeddings(model) == ["model.embed_tokens", "lm_head"]
    head = load_file(tmp_path / "base/model.safetensors")["lm_head.weight"]
    assert torch.equal(model.lm_head.weight, head.float())
    assert "quantize: lm_head.weight differs from model.embed_tokens" in capsys.readouterr().out


@pytest.mark.parametrize("edit", [with_head(0.0), lambda _: None], ids=["same", "absent"])
def test_a_head_that_is_the_embeddings_changes_nothing(tmp_path, edit):
    make_model(tmp_path / "base")
    edit_tensors(tmp_path / "base", edit)
    for name in ("nf4", "none"):
        (tmp_path / name).mkdir()
    quantize(tmp_path / "base", tmp_path / "nf4", double_quant=True)
    link(tmp_path / "base", tmp_path / "none")
    own = (tmp_path / "base/config.json").read_bytes()
    assert (tmp_path / "none/config.json").read_bytes() == own
    expected = json.loads(own) | {"quantization_config": quantization_config(True).to_dict()}
    assert json.loads((tmp_path / "nf4/config.json").read_text()) == expected
    assert not has_own_head(tmp_path / "base", tmp_path / "nf4")


def test_left_over_weights_are_named_where_transformers_would_warn(tmp_path, capsys):
    make_model(tmp_path / "base")
    edit_tensors(tmp_path / "base", lambda tensors: tensors.update(OLD))
    link(tmp_path / "base", tmp_path)
    assert capsys.readouterr().out == ""
    edit_tensors(tmp_path / "base", lambda tensors: tensors.update(EXTRA))
    (tmp_path / "out").mkdir()
    link(tmp_path / "base", tmp_path / "out")
    said = "quantize: not part of the model, and without effect: \\x1b[2J, model.extra.weight\n"
    assert capsys.readouterr().out == said


# Every old checkpoint of Llama contains them.
OLD = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
EXTRA = {"model.extra.weight": torch.ones(8, 8), "\x1b[2J": torch.ones(8)}


# As old checkpoints contain them beside an attention, and some that no family has.
BESIDE = {
    "bias": torch.ones(1, 1, 16, 16, dtype=torch.bool).tril(),
    "masked_bias": torch.tensor(-1e9).half(),  # -inf
    "rotary_emb.inv_freq": torch.rand(8),
    "large": torch.tensor([-1e9]),
    "causal_mask": torch.ones(1, 1, 16, 16, dtype=torch.uint8).tril(),
    "position_ids": torch.arange(300)[None],
    "nan": torch.full((2, 3), float("nan"), dtype=torch.float64),
    "empty": torch.empty(0, 4),
    "scale": torch.tensor(1e-30),
    "unsigned": torch.tensor([2**16 - 1], dtype=torch.uint16),
    "eight.weight": torch.rand(64, 64).to(torch.float8_e4m3fn),
    # No Linear to adapt.
    "further.q_proj.weight": torch.randn(64, 64),
}
ATTENTIONS = {
    "gpt_neox": "gpt_neox.layers.1.attention",
    "gptj": "transformer.h.1.attn",
    "llama": "model.layers.1.self_attn",
}


SIZES = {"gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "rotary_dim": 8}}
FORMS = {"nf4": partial(quantize, double_quant=True), "none": link}


def bits(tensor):
    return tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize(
    ("arch", "form", "base"),
    [
        ("gpt_neox", "nf4", "dequantized"),
        ("gpt_neox", "none", "original"),
        ("gptj", "nf4", "original"),
        ("gptj", "none", "dequantized"),
        ("llama", "nf4", "dequantized"),
        ("llama", "none", "original"),
    ],
)
def test_what_belongs_to_no_module_is_carried_along_bit_by_bit(tmp_path, arch, form, base):
    """Also through a merge in float16, with an adapter on all Linears."""
    project = make_workspace(
        tmp_path / "ws",
        quantize={"type": form},
        merge={"base": base, "dtype": "float16"},
        train={"epochs": 0.1},
        evaluate={"samples": 1, "max_answer_tokens": 4},
    )
    shutil.rmtree(project / "tiny")
    make_tokenizer(project / "tiny")
    make_model(project / "tiny", arch, tie_word_embeddings=False, **SIZES.get(arch, {}))
    shutil.copytree(project / "tiny", tmp_path / "plain")
    own = load_file(project / "tiny/model.safetensors").keys()
    beside = {f"{ATTENTIONS[arch]}.{name}": tensor for name, tensor in BESIDE.items()}
    edit_tensors(project / "tiny", lambda tensors: tensors.update(OLD | EXTRA | beside))
    for name in yaml.safe_load((project / "dvc.yaml").read_text())["stages"]:
        quick.run(name, project)
    expected = {name: bits(tensor) for name, tensor in (OLD | EXTRA | beside).items()}
    for folder in ("quantized", "merged", "release"):
        found = load_file(project / f"models/{folder}/model.safetensors")
        assert {name: bits(found[name]) for name in expected} == expected, folder
    assert found.keys() == own | expected.keys()
    assert {found[name].dtype for name in own} == {torch.float16}
    weights = model_weights(project / "models/quantized")
    assert not weights.shapes.keys() & expected.keys()
    # Scoring counts only what is loaded.
    (tmp_path / "out").mkdir()
    FORMS[form](tmp_path / "plain", tmp_path / "out")
    assert decoder_in(weights) == decoder_in(model_weights(tmp_path / "out"))


def test_a_type_that_cannot_be_copied_is_refused_before_training(tmp_path):
    make_model(tmp_path / "base")
    with pytest.raises(StageError) as error:
        check_types(tmp_path, language_model(read_config(tmp_path / "base")), {}, {"a": "F4"})
    assert str(error.value).startswith(f"{tmp_path}: a is F4, which is not known here; remove it")


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
