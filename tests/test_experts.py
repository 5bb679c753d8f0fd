"""Packed experts compute the same as dequantized ones in transformers' own forward passes."""

import ast
import json
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit
from moe import MOE, TEXT, moe_config
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import MergeModulelist

from stages.planning.scoring import decoder_of
from stages.quantize import link, quantize
from stages.quantizing.names import check_names
from stages.quantizing.nf4_tensors import nf4
from stages.shared import packed
from stages.shared.base_bytes import weights_bytes
from stages.shared.experts import (
    OWN_CODE,
    check_converter,
    expert_stacks,
    expert_tensors,
    part_of,
)
from stages.shared.merging import AHEAD_BYTES, side_by_side
from stages.shared.model import load_base
from stages.shared.nf4 import dequantize
from stages.shared.own_logits import ROUNDING, difference, same_experts
from stages.shared.process import StageError
from stages.shared.scored_model import decoder_in, model_sizes
from stages.shared.text_model import find_backbone, kept_in_float32
from stages.shared.weights import (
    EXPERT_VALUES,
    Weights,
    model_weights,
    other_names,
    row_blocks,
)
from stages.shared.workload import read_model
from stages.training.adjusting import apply_liger
from stages.verifying import merged_model

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
IDS = torch.arange(3, 80)[None]


def through_nf4(weight: torch.Tensor, double_quant: bool = True) -> torch.Tensor:
    """Decoded from bitsandbytes' own encoding, [out, in] in float32."""
    codes, state = nf4(weight, double_quant, CPU)
    if double_quant:
        state.absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        state.nested = False
    state.dtype = torch.float32
    return dequantize(codes, state)


# Their checkpoints have all experts of a layer in one tensor.
STACKED = {"gpt_oss", "granitemoe", "llama4_text"}


def dequantized(model, double_quant: bool = True):
    """`model` in float32, with the NF4 values of each weight that quantize converts."""
    from stages.shared.linears import quantized_linears

    linears = quantized_linears(model)
    model.float()
    for name, tensor in expert_tensors(model).items():
        pieces = 2 if "gate_up" in name and apart(model) else 1
        for expert in tensor.data:
            for piece in expert.chunk(pieces):
                piece.copy_(through_nf4(piece.clone(), double_quant))
    for name in linears:
        weight = model.get_submodule(name).weight.data
        weight.copy_(through_nf4(weight.clone(), double_quant))
    return model


def apart(model) -> bool:
    """Whether checkpoints of the family have a tensor for each expert's gate and up."""
    return model.config.model_type not in STACKED


@pytest.fixture(scope="module", params=MOE)
def family(request, tmp_path_factory):
    """(a model in bfloat16, its checkpoint quantized)"""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(moe_config(request.param), dtype=torch.bfloat16)
    for name in kept_in_float32(model):
        owner, _, key = name.rpartition(".")
        tensor = getattr(model.get_submodule(owner), key)
        # Rounded to bfloat16, they would choose other experts.
        tensor.data = tensor.data.float() + 5 + 0.05 * torch.randn(tensor.shape)
    model.eval().save_pretrained(folder / "base")
    (folder / "out").mkdir()
    quantize(folder / "base", folder / "out", double_quant=True)
    return model, folder


def adapted(model, checkpointing: bool):
    find_backbone(model)
    targets = r".*self_attn\.(q_proj|q_b_proj|k_proj|kv_b_proj|o_proj)"
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(1)
    model = get_peft_model(model, config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        model.train()
    return model


def computed(model, checkpointing: bool) -> dict[str, torch.Tensor]:
    """Logits, and gradients of the input and of the adapters."""
    model = adapted(model, checkpointing)
    inputs = model.get_input_embeddings()(IDS).detach().float().requires_grad_()
    logits = model(inputs_embeds=inputs, use_cache=False).logits
    logits.float().square().mean().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert found
    return {name.replace("base_layer.", ""): g for name, g in found.items()} | {
        "logits": logits.detach(),
        "input": inputs.grad,
    }


@pytest.mark.parametrize(("checkpointing", "at_once"), [(False, 1), (True, 4)])
def test_it_is_what_dequantized_experts_compute(family, checkpointing, at_once, monkeypatch):
    model, folder = family
    expected = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    expected = computed(dequantized(expected.eval()), checkpointing)
    largest = max(t.numel() // len(t) for t in expert_tensors(model).values())
    monkeypatch.setattr(packed, "CHUNK_BYTES", 4 * at_once * largest)
    found = computed(load_base(folder / "out", CPU), checkpointing)
    assert found.keys() == expected.keys()
    off = {name: float((found[name] - expected[name]).abs().max()) for name in found}
    assert not any(off.values()), {name: x for name, x in off.items() if x}


def test_what_stays_in_float32_is_kept_to_the_bit(family):
    model, folder = family
    loaded = load_base(folder / "out", CPU, dtype=torch.bfloat16)
    kept = kept_in_float32(model)
    assert bool(kept) == (folder / "out/kept.json").exists()
    tensors = dict(loaded.named_parameters()) | dict(loaded.named_buffers())
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    assert all(torch.equal(tensors[name], own[name]) for name in kept)


def test_a_buffer_that_transformers_does_not_load_is_not_loaded(tmp_path):
    """Old checkpoints contain one; of 3 values it would not even fit."""
    model = AutoModelForCausalLM.from_config(moe_config("qwen3_moe"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    name = "model.rotary_emb.inv_freq"
    save_file(load_file(file) | {name: torch.ones(3)}, file, metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    quantize(tmp_path / "base", tmp_path / "out", True)
    own = dict(model.named_buffers())[name]
    packed_model = load_base(tmp_path / "out", CPU)
    merged = merged_model.empty_merged(Weights(tmp_path / "base"))
    for loaded in (packed_model, merged):
        assert torch.equal(dict(loaded.named_buffers())[name], own)


def test_each_tensor_of_the_checkpoint_is_read_alone(family):
    """By merge: the bytes are those of a Linear4bit of that tensor."""
    _, folder = family
    weights, base = model_weights(folder / "out"), load_file(folder / "base/model.safetensors")
    names = folder / "out/names.json"
    keys = json.loads(names.read_text()) if names.exists() else {}
    packed_tensors = weights.nf4 & weights._of_stack.keys()
    assert packed_tensors
    for name in packed_tensors:
        tensor = base[keys.get(name, name)]
        read = weights.reader(name, CPU)
        found = read(slice(0, len(tensor)))
        expected = torch.stack([through_nf4(each) for each in tensor.view(-1, *tensor.shape[-2:])])
        assert torch.equal(found, expected.view(tensor.shape).to(torch.bfloat16)), name


MISSING = {
    "a part": (
        ["up"],
        "transformers cannot make the model of the tensors in its files: some are m",
    ),
    "an expert": (["gate", "up", "down"], "down_proj is (3, 64, 64) in the files and (4, 64, 64)"),
}


@pytest.mark.parametrize(("parts", "said"), MISSING.values(), ids=MISSING)
@pytest.mark.parametrize("form", [lambda base, out: quantize(base, out, True), link])
def test_an_expert_that_is_missing_is_refused(tmp_path, form, parts, said):
    model = AutoModelForCausalLM.from_config(moe_config("qwen3_moe"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    tensors = load_file(file)
    for part in parts:
        del tensors[f"model.layers.0.mlp.experts.3.{part}_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    with pytest.raises(StageError, match=re.escape(said)):
        form(tmp_path / "base", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_an_expert_of_another_type_is_refused(tmp_path, dtype):
    model = AutoModelForCausalLM.from_config(moe_config("qwen3_moe"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    file, key = tmp_path / "model.safetensors", "model.layers.0.mlp.experts.3.up_proj.weight"
    tensors = load_file(file)
    save_file(tensors | {key: tensors[key].to(dtype)}, file, metadata={"format": "pt"})
    with pytest.raises(
        StageError, match=rf"{re.escape(key)} is \w+, not a float type: the weights"
    ):
        check_names(tmp_path)


def test_a_conversion_that_merge_cannot_undo_is_refused_by_name():
    interleave = type("Interleave", (), {"dim": 1})()
    converter = SimpleNamespace(operations=[MergeModulelist(dim=0), interleave])
    with pytest.raises(StageError, match=r"gate_up_proj of .* by MergeModulelist, Interleave"):
        check_converter("model.layers.0.mlp.experts.gate_up_proj", converter)


def test_plan_counts_the_bytes_that_are_loaded(family):
    _, folder = family
    model = load_base(folder / "out", CPU, dtype=torch.bfloat16)
    _, shape = read_model(folder / "out")
    states = [m.weight.quant_state for m in model.modules() if isinstance(m, Linear4bit)]
    stacks = [m for m in model.modules() if isinstance(m, packed.Packed)]
    held = sum(parameter.nbytes for parameter in model.parameters())
    held += sum(s.absmax.nbytes + s.state2.absmax.nbytes for s in states)
    held += sum(b.nbytes for m in stacks for key, b in m.named_buffers() if key != "code")
    assert abs(weights_bytes(shape, "qlora", True) / held - 1) < 0.01
    assert shape.expert_parameters == sum(math.prod(m.shape) for m in stacks)
    chosen = 4 if model.config.model_type == "llama4_text" else 2
    assert shape.active_parameters == shape.parameters - (1 - chosen / 4) * shape.expert_parameters


def test_what_scoring_takes_is_told_alike_by_files_and_configuration(family):
    _, folder = family
    _, shape = read_model(folder / "out")
    found, planned = decoder_in(model_weights(folder / "out")), decoder_of(shape)
    for name in ("layers", "hidden", "intermediate", "keys", "largest", "mxfp4"):
        assert getattr(found, name) == getattr(planned, name), name


def test_liger_leaves_packed_experts_alone(monkeypatch):
    """Liger's own experts read dense weights. It must not choose kernels by what is installed."""
    seen, dispatch = {}, pytest.importorskip("liger_kernel.backends.dispatch")
    monkeypatch.setattr(dispatch, "_GLOBAL_IMPL", None)
    liger = SimpleNamespace(_apply_liger_kernel_to_instance=lambda **parts: seen.update(parts))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    for kind, asked in (("qwen3_moe", {"swiglu": False}), ("qwen3", {})):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TEXT))
        seen.clear()
        apply_liger(model)
        assert seen.pop("model") is model
        assert seen == asked | {"cross_entropy": False, "fused_linear_cross_entropy": False}
        assert dispatch.get_impl() == "nvidia-triton"


def test_liger_refuses_no_family_what_it_is_asked_for(monkeypatch):
    """Read from its source, which cannot be imported without Triton."""
    asked, package = {}, pytest.importorskip("liger_kernel")
    liger = SimpleNamespace(_apply_liger_kernel_to_instance=lambda **parts: asked.update(parts))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    with torch.device("meta"):
        apply_liger(AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **TEXT)))
    file = Path(package.__file__).parent / "transformers/monkey_patch.py"
    refused = {}
    functions = [x for x in ast.parse(file.read_text()).body if isinstance(x, ast.FunctionDef)]
    for function in functions:
        names = [argument.arg for argument in function.args.args][::-1]
        values = function.args.defaults[::-1]
        on = {name: value.value for name, value in zip(names, values, strict=False)} | asked
        for node in ast.walk(function):
            if isinstance(node, ast.If) and isinstance(node.body[0], ast.Raise):
                name = ast.unparse(node.test)
                refused[f"{function.name}: {name}"] = bool(on.get(name))
    assert "apply_liger_kernel_to_glm4: rope" in refused
    assert not any(refused.values()), refused


def test_the_same_experts_compute_a_token_in_a_trial(family):
    """A router may choose other experts for differently rounded rows, which is no error here."""
    model, _ = family
    stacks = [m for m in expert_stacks(model).values() if type(m).__name__ not in OWN_CODE]
    seen = []
    hooks = [m.register_forward_hook(lambda _, args, __: seen.append(args[1:])) for m in stacks]
    with torch.no_grad(), same_experts(model):
        model(input_ids=IDS, use_cache=False)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(stacks)
    for chosen, weights in seen:
        assert (chosen == torch.arange(2)).all()
        if kept_in_float32(model):
            assert (weights == 0.5).all()
        else:
            assert (weights[:, 0] >= weights[:, 1]).all()


def test_a_router_that_computes_something_else_is_seen_in_a_trial():
    """Though its choice is not compared."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(moe_config("qwen3_moe"), dtype=torch.float32).eval()

    def logits():
        with torch.no_grad(), same_experts(model):
            return model(input_ids=IDS, use_cache=False).logits[0]

    before = logits()
    routers = [m for name, m in model.named_modules() if name.endswith("mlp.gate")]
    for router in routers:
        router.weight.data += 1e-6 * torch.randn_like(router.weight)
    assert difference(logits(), before) < ROUNDING[torch.float32]
    for router in routers:
        router.weight.data *= 30
    assert difference(logits(), before) > ROUNDING[torch.float32]


@pytest.mark.parametrize("family", [name for name in MOE if name not in STACKED], indirect=True)
def test_merged_experts_are_stacked_layer_by_layer(family, monkeypatch):
    """transformers would stack those of all layers in host memory."""
    model, folder = family
    renamed = other_names(folder / "out")
    assert any(part_of(name) for name in renamed.values())
    sizes = model_sizes(folder / "out", 80, CPU, dense=True)
    monkeypatch.setattr(merged_model, "load_merged", None)
    placed, streamer = merged_model.place_merged(folder / "base", sizes, CPU, renamed=renamed)
    assert streamer.count == model.config.num_hidden_layers
    assert all(
        t.untyped_storage().nbytes() <= 4 for layer in streamer.source.layers for _, t in layer
    )
    expected = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
    with torch.no_grad():
        found = placed(input_ids=IDS, use_cache=False).logits
        assert torch.equal(found, expected(input_ids=IDS, use_cache=False).logits)
    other, _ = merged_model.place_merged(
        folder / "base", sizes, CPU, renamed=renamed, make=lambda name, x: x.zero_()[...]
    )
    assert not other(input_ids=IDS, use_cache=False).logits.any()


def test_experts_in_16_bit_compute_alike_in_scoring_and_answers(tmp_path):
    """On a GPU transformers takes another code for answers than this, whose name it knows."""
    model = AutoModelForCausalLM.from_config(moe_config("mixtral"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = load_base(tmp_path, CPU)
    assert "grouped_mm" not in loaded.get_experts_implementation().values()
    found = loaded(input_ids=IDS, use_cache=False).logits
    loaded.set_experts_implementation("grouped_mm")
    assert torch.equal(loaded(input_ids=IDS, use_cache=False).logits, found)


def test_blocks_of_experts_keep_to_a_budget():
    experts = 16, 2880, 5760
    every = row_blocks(experts, torch.device("cuda"))
    assert [b.start for b in every[1:]] == [b.stop for b in every[:-1]]
    assert every[-1].stop == 16
    for blocks in (every, row_blocks(experts, CPU)):
        size = max(b.stop - b.start for b in blocks) * 2880 * 5760
        assert size <= EXPERT_VALUES
        assert side_by_side(experts, blocks) * size * 12 <= AHEAD_BYTES
    assert side_by_side((64, 64), [slice(0, 64)]) == len(os.sched_getaffinity(0))
