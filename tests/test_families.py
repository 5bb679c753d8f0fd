"""A few families, each with a known difficulty; tests/families.py has all of them."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, HANDFUL, config_of, make_checkpoint, model_of, works
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from stages.merging.companions import served_config, write_companions
from stages.plan import tell_left_out
from stages.quantize import link, quantize
from stages.quantizing.names import check_names
from stages.shared.adapted import check_adapted, targets_as_written
from stages.shared.embeddings import has_own_head
from stages.shared.linears import quantized_linears
from stages.shared.model import load_base
from stages.shared.multimodal import MULTIMODAL
from stages.shared.own_logits import check_head
from stages.shared.params import Lora
from stages.shared.process import StageError
from stages.shared.text_model import find_backbone, key_mapping, language_config, read_config
from stages.shared.weights import Weights, other_names
from stages.shared.workload import match_targets, shape_of
from stages.training.settings import lora_config
from stages.verifying.folder_check import check_companions, without_old_names

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TOWERS = sorted(name for name, family in FAMILIES.items() if family.text is not None)
TEXT_ALONE = sorted(
    name for name, family in FAMILIES.items() if family.text is None and not family.says
)
IDS = torch.arange(3, 40)[None]


def test_every_checkpoint_with_towers_is_tried():
    assert {FAMILIES[name].kind for name in TOWERS} == MULTIMODAL


@torch.no_grad()
@pytest.mark.parametrize("name", TOWERS)
def test_the_language_model_computes_what_the_whole_does(name, tmp_path):
    """From the Hub's files, without the other towers."""
    family = FAMILIES[name]
    make_checkpoint(tmp_path / "base", family)
    (tmp_path / "out").mkdir()
    link(tmp_path / "base", tmp_path / "out")
    whole = model_of(family).float()
    language = load_base(tmp_path / "out", CPU)
    expected = whole(input_ids=IDS, use_cache=False).logits
    assert torch.equal(language(input_ids=IDS, use_cache=False).logits, expected)
    # The reverse: by patterns, as for loading the merged model.
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base",
        config=read_config(tmp_path / "base"),
        key_mapping=key_mapping(other_names(tmp_path / "out")),
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not report["missing_keys"]
    assert torch.equal(again.eval()(input_ids=IDS, use_cache=False).logits, expected)


@pytest.mark.parametrize("name", [*TEXT_ALONE, "gemma4", "mllama", "qwen3_5"])
def test_what_is_scored_counted_and_adapted_is_the_models_own(name):
    config = language_config(config_of(FAMILIES[name]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    # Far enough from zero for a cap to have an effect.
    model.get_output_embeddings().weight.data.mul_(20)
    find_backbone(model)
    check_head(model, IDS.tolist())
    shape = shape_of(config)
    assert shape.parameters == model.num_parameters()
    assert {x.name for x in shape.linears if x.quantized} == quantized_linears(model)
    # A list also names layers that only process images, if their names have the same ending.
    wanted = "all-linear" if name != "mllama" else ["q_proj", "down_proj"]
    lora = Lora(
        r=4,
        alpha=8,
        scaling="standard",
        dropout=0.0,
        target_modules=wanted,
        experts=False,
        new_tokens=[],
    )
    with targets_as_written():
        adapted = get_peft_model(model, lora_config(lora, model))
    check_adapted(adapted, match_targets(shape, wanted), "wanted", "")


def test_plan_says_what_all_linear_leaves_out(capsys):
    """PEFT would refuse it with a traceback in train."""
    shape = shape_of(config_of(FAMILIES["falcon_h1"]))
    tell_left_out(shape, "all-linear")
    said = "all-linear leaves out 2 layers such as model.layers.0.mamba.out_proj, where an adapter"
    assert said in capsys.readouterr().out
    with pytest.raises(StageError, match="out_proj is no linear layer of the base that can be ad"):
        match_targets(shape, ["q_proj", "out_proj"])


@pytest.mark.parametrize("name", [*TEXT_ALONE, *TOWERS])
def test_what_transformers_4_reads_of_a_configuration_changes_nothing_in_5(name, tmp_path):
    config_of(FAMILIES[name]).save_pretrained(tmp_path)
    expected = AutoConfig.from_pretrained(tmp_path).to_dict()
    served = served_config(json.loads((tmp_path / "config.json").read_text()))
    (tmp_path / "config.json").write_text(json.dumps(served))
    found = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert without_old_names(found, expected) == expected


def test_a_head_that_differs_is_not_tied_in_a_model_with_towers(tmp_path):
    """Its configuration, and that of the text, would tie it and say where they were."""
    base, out = tmp_path / "base", tmp_path / "out"
    make_checkpoint(base, FAMILIES["gemma3"])
    config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": True}
    config["text_config"] |= {"tie_word_embeddings": True}
    config["vision_config"] |= {"_name_or_path": "/home/me/tower"}
    (base / "config.json").write_text(json.dumps(config))
    out.mkdir()
    quantize(base, out, double_quant=True)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert has_own_head(base, out)
    merged = tmp_path / "merged"
    merged.mkdir()
    write_companions(merged, base, base, torch.float16, own_head=True)
    check_companions(merged, base, "float16", own_head=True)
    served = json.loads((merged / "config.json").read_text())
    assert served["tie_word_embeddings"] is served["text_config"]["tie_word_embeddings"] is False
    assert "_name_or_path" not in served["vision_config"]
    with pytest.raises(StageError, match="json: text_config is "):
        check_companions(merged, base, "float16")


@pytest.mark.parametrize("name", ["falcon", "gemma3n_text", "llama", "gptj"])
def test_what_is_quantized_is_what_transformers_quantizes(name, tmp_path):
    from tests.test_quantize import quantized_by_transformers

    make_checkpoint(tmp_path / "base", FAMILIES[name])
    (tmp_path / "ours").mkdir()
    quantize(tmp_path / "base", tmp_path / "ours", double_quant=True)
    quantized_by_transformers(tmp_path / "base", tmp_path / "theirs", double_quant=True)
    ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_weights_are_called_as_the_model_calls_them(tmp_path):
    make_checkpoint(tmp_path, FAMILIES["gemma3"])
    names = check_names(tmp_path)
    weights = Weights(tmp_path, names.of)
    assert "model.layers.0.self_attn.q_proj.weight" in weights.names
    assert "vision_tower.post_layernorm.weight" in weights.names
    key = "language_model.model.layers.0.self_attn.q_proj.weight"
    assert weights.key("model.layers.0.self_attn.q_proj.weight") == key
    stored = load_file(tmp_path / "model.safetensors")[key]
    assert torch.equal(weights.read("model.layers.0.self_attn.q_proj.weight"), stored)


@pytest.mark.parametrize(("name", "setting"), HANDFUL.items())
def test_a_handful_goes_through_the_pipeline(name, setting, finished, tmp_path):
    family = FAMILIES[name]
    if name == "qwen3_moe":
        family = replace(family, lora={"experts": True})
    folder = shutil.copytree(finished, tmp_path / "ws", symlinks=True)
    make_checkpoint(folder / "tiny", family)
    assert works(folder, family, setting, packing=setting == "16 bit") is None
    if family.lora:
        # By a process of its own: merge hides torch from transformers, but for such adapters.
        merged = (folder / "models/merged/SHA256SUMS").read_bytes()
        shutil.rmtree(folder / "models/merged")
        subprocess.run([sys.executable, "-m", "stages.merge"], cwd=folder, check=True)
        assert (folder / "models/merged/SHA256SUMS").read_bytes() == merged
