"""The adapted modules are those that were asked for, whatever PEFT matches by their names."""

import json
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from families import FAMILIES, config_of
from merging import make_adapter
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny import PARAMS, make_model, make_tokenizer
from transformers import AutoModelForCausalLM
from yaml import safe_load

from stages.shared.adapted import check_adapted, lost_elsewhere, targets_as_written
from stages.shared.adapter import read_adapter
from stages.shared.experts import unknown_experts
from stages.shared.fast_path import FastPath
from stages.shared.linears import adaptable_linears, targets_of
from stages.shared.model import load_adapter, load_base
from stages.shared.params import Lora, Params
from stages.shared.placement import Placement
from stages.shared.process import StageError
from stages.shared.text_model import find_backbone
from stages.shared.workload import match_targets, shape_of
from stages.training import building
from stages.training.building import TrainingSet, build_trainer
from stages.training.settings import lora_config

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
IDS = torch.arange(3, 40)[None]
LORA = {
    "experts": False,
    "new_tokens": [],
    "r": 4,
    "alpha": 8,
    "scaling": "standard",
    "dropout": 0.0,
}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
# Layers beside the experts of each family, which all-linear therefore adapts.
ADAPTED = {
    "deepseek_v3": MLP | {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
    "ernie4_5_moe": ATTENTION | MLP,
    "glm4_moe": ATTENTION | MLP,
    "gpt_oss": ATTENTION,
    "granitemoe": ATTENTION,
    "llama4_text": ATTENTION | MLP,
    "mixtral": ATTENTION,
    "olmoe": ATTENTION,
    "qwen2_moe": ATTENTION | MLP,
    "qwen3_moe": ATTENTION,
}


def make(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(FAMILIES[name]), dtype=torch.float32).eval()
    find_backbone(model)
    return model


def config_for(model, targets="all-linear"):
    return lora_config(Lora(**LORA, target_modules=targets), model)


def leaves(names):
    return {name.rsplit(".", 1)[-1] for name in names}


@pytest.mark.parametrize("name", ADAPTED)
def test_all_linear_is_all_but_experts_and_what_chooses_them(name, tmp_path):
    model = make(name)
    asked = adaptable_linears(model)
    assert leaves(asked) == ADAPTED[name]
    plain = {n for n, m in model.named_modules() if type(m) is torch.nn.Linear}
    assert plain - set(asked) == {
        n for n in plain if n == "lm_head" or n.endswith("shared_expert_gate")
    }
    with targets_as_written():
        adapted = get_peft_model(model, config_for(model))
    check_adapted(adapted, asked, "asked", "")
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1)
    adapted.save_pretrained(tmp_path)
    again = load_adapter(make(name), tmp_path)
    with torch.no_grad():
        found, expected = (
            m.eval()(input_ids=IDS, use_cache=False).logits for m in (again, adapted)
        )
    assert torch.equal(found, expected)
    shapes = {n.replace(".base_layer", ""): tuple(p.shape) for n, p in model.named_parameters()}
    # As files have them: one by one.
    shapes["model.layers.1.mlp.experts.0.gate_proj.weight"] = (64, 64)
    assert {w.removesuffix(".weight") for w in read_adapter(tmp_path, shapes)} == set(asked)


@pytest.mark.parametrize("name", ["recurrent_gemma", "falcon_h1", "nemotron_h"])
def test_tensors_of_recurrent_layers_are_no_experts(name):
    """Some have three dimensions."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(FAMILIES[name]))
    assert unknown_experts(model) == []


@pytest.mark.parametrize("target", ["gate_proj", "gate", "gate_up_proj"])
def test_experts_and_routers_are_no_targets(target):
    shape = shape_of(config_of(FAMILIES["qwen3_moe"]))
    said = f"target_modules: {target} is no linear layer .*; its experts .* by lora.experts: true$"
    with pytest.raises(StageError, match=said):
        match_targets(shape, ["q_proj", target])


# All that PEFT says of it.
WARNED = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")


@WARNED
@pytest.mark.parametrize("targets", ["all-linear", [*sorted(MLP), "o_proj"]])
def test_what_peft_makes_of_the_names_of_an_mlp_is_refused(targets):
    model = make("deepseek_v3")
    asked = targets_of(targets, adaptable_linears(model))
    adapted = get_peft_model(model, config_for(model, targets))
    with pytest.raises(StageError) as error:
        check_adapted(adapted, asked, "lora.target_modules", "name others")
    said = str(error.value)
    assert said.startswith("lora.target_modules: PEFT does otherwise for deepseek_v3: model.layers")
    assert "mlp.down_proj (and 5 others) gets no adapter" in said
    assert "mlp.experts" in said
    assert said.endswith("gets one; name others")


@WARNED
@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "llama4_text", "mixtral"])
def test_what_stock_peft_leaves_out_is_known(name, tmp_path):
    model = make(name)
    asked = adaptable_linears(model)
    with targets_as_written():
        get_peft_model(model, config_for(model)).save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(make(name), tmp_path).get_base_model()
    loaded = {n for n, m in stock.named_modules() if isinstance(m, LoraLayer)}
    assert lost_elsewhere(name, asked) == sorted(set(asked) - loaded)
    assert bool(lost_elsewhere(name, asked)) == (name in ("deepseek_v3", "glm4_moe"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_model(folder)
    return folder


@WARNED
@pytest.mark.parametrize(
    ("written", "said"),
    [
        (["q_proj"], "v_proj (and 1 others) gets no adapter"),
        (["q_proj", "v_proj", "k_proj"], "k_proj (and 1 others) gets one"),
    ],
)
def test_an_adapter_that_peft_loads_in_part_is_refused(written, said, base, tmp_path):
    make_tokenizer(base)
    make_adapter(base, tmp_path, target_modules=["q_proj", "v_proj"])
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": written}))
    with pytest.raises(StageError, match=r"PEFT does otherwise for llama: ") as error:
        load_adapter(load_base(base, CPU), tmp_path)
    assert said in str(error.value)


@pytest.fixture
def build(tmp_path):
    def build(name):
        tokenizer = make_tokenizer(tmp_path / "tokenizer")
        rows = [[3 + i, 90 + 7 * i] * (10 + i) for i in range(4)]
        data = TrainingSet(Dataset.from_dict({"input_ids": rows, "labels": rows}), tokenizer, 60)
        raw = safe_load(PARAMS.read_text())
        raw["lora"] |= LORA | {"target_modules": "all-linear"}
        raw["train"] |= {"batching": "shuffle", "batch_size": 2}
        fast = FastPath("sdpa", padding_free=False, liger=False, fused_lora=False)
        params, placement = Params.model_validate(raw), Placement(2, 2)
        return build_trainer(make(name), data, params, fast, placement, tmp_path / "out")

    return build


@WARNED
def test_training_begins_with_what_was_asked_or_not_at_all(build, monkeypatch, capsys):
    build("deepseek_v3")
    assert "PEFT alone would skip 6 of the adapter's 16 modules" in capsys.readouterr().out
    monkeypatch.setattr(building, "targets_as_written", nullcontext)
    with pytest.raises(StageError, match=r"^lora.target_modules: PEFT does otherwise for deepseek"):
        build("deepseek_v3")


def test_the_loss_is_that_of_the_learned_tokens_alone(build, monkeypatch):
    """None of the router's, which is frozen, however much of it the base's own settings ask for."""
    for key, value in {"output_router_logits": True, "router_aux_loss_coef": 100.0}.items():
        monkeypatch.setitem(FAMILIES["qwen3_moe"].settings, key, value)
    trainer = build("qwen3_moe")
    assert not trainer.aux_loss_enabled
    assert not trainer.model.config.output_router_logits
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=40)
    logits = trainer.model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(
        logits, batch["labels"][:, 1:].flatten(), reduction="sum"
    )
    assert loss.item() == pytest.approx(expected.item() / 40, rel=1e-5)
