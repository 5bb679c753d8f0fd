"""LoRA on packed experts is PEFT's own: its file, its results, its merge."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, config_of
from moe import moe_config
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import PARAMS
from transformers import AutoModelForCausalLM
from yaml import safe_load

from stages.quantize import quantize
from stages.shared import expert_lora
from stages.shared.adapted import targets_as_written
from stages.shared.adapter import read_adapter
from stages.shared.decoder_shape import adapter_parameters, expert_adapter_parameters
from stages.shared.expert_lora import stand_ins, target_parameters, use_factors, wrapper_names
from stages.shared.experts import expert_tensors, part_of
from stages.shared.linears import targets_of
from stages.shared.merging import merged_rows
from stages.shared.model import load_adapter, load_base
from stages.shared.packed import Groups, Packed
from stages.shared.params import Params
from stages.shared.process import StageError
from stages.shared.text_model import find_backbone
from stages.shared.weights import Weights, model_weights, other_names
from stages.shared.workload import check_expert_lora, check_expert_widths, shape_of
from stages.verifying import tensor_check
from tests.test_experts import CPU, IDS, dequantized

pytestmark = pytest.mark.slow

# Per expert and in one tensor, turned and not, with dense layers and shared experts beside.
KINDS = ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "deepseek_v3"]
TARGETS = ["q_proj", "q_b_proj", "o_proj"]


def adapted(base):
    """`base` with adapters on attention and on experts, all at random values."""
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=TARGETS,
        target_parameters=target_parameters(base),
    )
    with targets_as_written(), stand_ins(base):
        model = get_peft_model(base, config)
    use_factors(model)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1)
    return model


@pytest.fixture(scope="module", params=KINDS)
def family(request, tmp_path_factory):
    """(the adapted model, its folder with base, out and adapter)"""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(moe_config(request.param), dtype=torch.bfloat16)
    model.eval().save_pretrained(folder / "base")
    (folder / "out").mkdir()
    quantize(folder / "base", folder / "out", double_quant=True)
    model = adapted(load_base(folder / "out", CPU))
    model.save_pretrained(folder / "adapter")
    return model, folder


def computed(model, checkpointing: bool):
    """Logits, and gradients of the adapters."""
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        model.train()
    logits = model(input_ids=IDS, use_cache=False).logits
    logits.square().mean().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return {"logits": logits.detach()} | found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_computes_and_learns_what_peft_does_on_dequantized_experts(family, checkpointing):
    model, folder = family
    plain = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    plain = dequantized(plain.eval()).float()
    find_backbone(plain)
    # Stock PEFT, which says nothing of missing or further keys.
    stock = PeftModel.from_pretrained(plain, folder / "adapter", is_trainable=True)
    expected, found = computed(stock, checkpointing), computed(model, checkpointing)
    assert found.keys() == expected.keys()
    assert sum("experts" in name for name in found) >= 4
    for name, wanted in expected.items():
        assert (found[name] - wanted).norm() < 1e-5 * wanted.norm(), name


def test_an_adapter_is_what_it_was_when_loaded_again_and_can_be_left_out(family):
    model, folder = family
    again = load_adapter(load_base(folder / "out", CPU), folder / "adapter")
    base = load_base(folder / "out", CPU)
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
        assert torch.equal(again(input_ids=IDS, use_cache=False).logits, expected)
        with again.disable_adapter():
            without = again(input_ids=IDS, use_cache=False).logits
        assert torch.equal(without, base(input_ids=IDS, use_cache=False).logits)
    held = {n for n, m in again.get_base_model().named_modules() if hasattr(m, "parameter_name")}
    assert held == wrapper_names(base)


def of_checkpoint(state, name: str) -> torch.Tensor:
    """The rows of a model's tensors that the checkpoint calls `name`."""
    tensor, expert, piece = part_of(name) or (name, None, 0)
    if expert is None:
        return state[tensor]
    return state[tensor][expert].chunk(2 if "gate_up" in tensor else 1)[piece]


def merged(source: Weights, updates, dtype) -> dict[str, torch.Tensor]:
    def of(name: str) -> torch.Tensor:
        blocks = merged_rows(source, name, updates.get(name), dtype, CPU)
        return torch.cat([block.values for block in blocks])

    return {name: of(name) for name in source.names}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_merge_is_that_of_peft_to_the_bit(family, dtype):
    _, folder = family
    source = model_weights(folder / "out")
    plain = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16).to(dtype)
    state = plain.state_dict()
    for name, values in merged(source, {}, dtype).items():
        of_checkpoint(state, name).copy_(values)
    stock = PeftModel.from_pretrained(plain, folder / "adapter").merge_and_unload().state_dict()
    updates = read_adapter(folder / "adapter", source.shapes, folder / "out")
    changed = {part_of(name)[0] if part_of(name) else name for name in updates}
    assert changed >= expert_tensors(plain).keys()
    for name, values in merged(source, updates, dtype).items():
        assert torch.equal(values, of_checkpoint(stock, name)), name


@pytest.mark.parametrize("base", ["dequantized", "original"])
def test_verify_sees_an_expert_that_lacks_its_part(family, base, tmp_path, monkeypatch):
    model, folder = family
    source = model_weights(folder / "out")
    shapes = source.shapes
    if base == "original":
        source = Weights(folder / "base", other_names(folder / "out"))
    updates = read_adapter(folder / "adapter", shapes, folder / "out")
    tensors = merged(source, updates, torch.bfloat16)
    # One expert at a time.
    monkeypatch.setattr(tensor_check, "AT_ONCE", 1)

    def check() -> None:
        save_file(tensors, tmp_path / "model.safetensors")
        folders = Weights(tmp_path), model, source, source
        tensor_check.check_tensors(*folders, torch.bfloat16, CPU)

    check()
    name = next(name for name in sorted(tensors) if "down_proj" in name and "experts" in name)
    part = tensors[name] if part_of(name) else tensors[name][2]
    part.copy_(source.reader(name, CPU)(slice(0, len(tensors[name])))[... if part_of(name) else 2])
    with pytest.raises(StageError, match=rf"{name} \("):
        check()


def test_plan_counts_the_parameters_that_train(family):
    model, _ = family
    shape = shape_of(model.get_base_model().config)
    names = (linear.name for linear in shape.linears)
    attention = [t for t in TARGETS if any(x.name.endswith(t) for x in shape.linears)]
    linears = adapter_parameters(shape, 4, frozenset(targets_of(attention, names)))
    expected = linears + expert_adapter_parameters(shape, 4)
    assert expected == model.get_nb_trainable_parameters()[0]


REFUSED: dict[str, tuple[Callable, str]] = {
    "a bias": (
        lambda c, _: c | {"target_parameters": ["experts.gate_up_proj_bias"]},
        "experts.gate_up_proj_bias of target_",
    ),
    "a part": (lambda c, _: c | {"target_parameters": ["experts.gate"]}, "experts.gate of target_"),
    "a half": (
        lambda c, t: t.pop(next(k for k in t if "experts.lora_B" in k)) is None or c,
        "experts: lora_B is missing",
    ),
    "a rank": (
        lambda c, _: c | {"rank_pattern": {"experts.gate_up_proj": 2}},
        r"experts.base_layer: lora_A is 16 x 64 and must be 8 x 64",
    ),
}


@pytest.mark.parametrize(("change", "said"), REFUSED.values(), ids=REFUSED)
def test_factors_that_do_not_fit_are_refused(family, change, said, tmp_path):
    _, folder = family
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    file, config = (
        tmp_path / "adapter" / f"adapter_{n}" for n in ("model.safetensors", "config.json")
    )
    tensors = load_file(file)
    config.write_text(json.dumps(change(json.loads(config.read_text()), tensors)))
    save_file(tensors, file)
    with pytest.raises(StageError, match=said):
        read_adapter(tmp_path / "adapter", model_weights(folder / "out").shapes, folder / "out")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("llama4_text", "llama4_text computes its experts by code of its own; set lora.experts: f"),
        ("llama", "llama has no experts"),
    ],
)
def test_a_family_without_it_is_refused_by_name(name, said):
    config = config_of(FAMILIES[name])
    with pytest.raises(StageError, match=f"lora.experts: {said}"):
        check_expert_lora(config, shape_of(config))


def test_widths_that_nf4_cannot_hold_are_refused_by_plan():
    shape = shape_of(moe_config("qwen3_moe"))
    check_expert_widths(shape)
    narrow = replace(shape, experts=(replace(shape.experts[0], columns=96),))
    with pytest.raises(StageError, match=r"rows of 96 values, no multiple of 64: .*type: none$"):
        check_expert_widths(narrow)
    check_expert_widths(replace(narrow, mxfp4=True))


def test_what_peft_has_no_form_for_is_refused_with_the_parameters():
    raw = safe_load(PARAMS.read_text())
    raw["lora"] |= {"experts": True, "dropout": 0.1}
    with pytest.raises(ValueError, match="dropout: must be 0 with experts: true"):
        Params.model_validate(raw)
    raw["lora"]["dropout"], raw["quantize"]["type"] = 0.0, "none"
    with pytest.raises(ValueError, match=r"lora.experts: true needs quantize.type: nf4"):
        Params.model_validate(raw)


def test_experts_without_rows_learn_nothing():
    class Double(Packed):
        shape = (3, 8, 8)

        def dense(self, first, last, dtype):
            return torch.eye(8, dtype=dtype).mul(2).expand(last - first, 8, 8)

    a, b = torch.randn(3, 4, 8, requires_grad=True), torch.randn(3, 8, 4, requires_grad=True)
    packed, x = Double(), torch.randn(5, 8)
    factors = SimpleNamespace(disable_adapters=False, scaling={"default": 0.5})
    packed.added = expert_lora.Factors(factors)
    packed.added.stacked = lambda: (a, b)
    y = packed(x, Groups(torch.tensor([2, 2, 5])))
    expected = 2 * x + torch.cat([0.5 * x[:2] @ a[0].T @ b[0].T, 0.5 * x[2:] @ a[2].T @ b[2].T])
    assert torch.allclose(y, expected, atol=1e-5)
    y.sum().backward()
    assert not a.grad[1].any()
    assert not b.grad[1].any()
    assert a.grad[2].any()
