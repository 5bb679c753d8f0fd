"""The fast path computes the loss and every adapter gradient of plain PEFT."""

import copy
import weakref

import pytest
import torch
from bitsandbytes.nn import Params4bit
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from stages.quantize import quantize
from stages.shared.model import load_base
from stages.shared.nf4 import dequantize
from stages.shared.placement import Placement
from stages.training import fused_lora
from stages.training.adjusting import remember_parameters
from stages.training.fused_lora import fuse_lora, keep_dense
from tests.tiny import SHAPE, make_model

CPU = torch.device("cpu")
# Two layers: everything kept, and everything recomputed.
PLACEMENTS = {False: Placement(2, 2), True: Placement()}


ARCHITECTURES = ["llama", "mistral", "qwen2", "gemma"]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    folders = {}
    for arch in ARCHITECTURES:
        folder = tmp_path_factory.mktemp(arch)
        make_model(folder / "base", arch)
        folders[arch] = folder / "nf4"
        folders[arch].mkdir()
        quantize(folder / "base", folders[arch], double_quant=True)
    return folders


def adapted(folder, **settings):
    """The model with an adapter whose B is not zero: at zero most errors are invisible."""
    config = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", **settings)
    return with_random_adapter(get_peft_model(load_base(folder, CPU), config).train())


def with_random_adapter(model):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float32) * 0.1
    return model


def loss_and_gradients(model):
    ids = torch.arange(3, 3 + 2 * 24).view(2, 24)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return loss.item(), gradients


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("arch", "rslora"), [*((a, False) for a in ARCHITECTURES), ("llama", True)]
)
def test_fused_lora_has_the_loss_and_gradients_of_peft(quantized, arch, rslora, checkpointing):
    loss, expected = loss_and_gradients(adapted(quantized[arch], use_rslora=rslora))
    model = adapted(quantized[arch], use_rslora=rslora)
    assert fuse_lora(model, liger=False, placement=PLACEMENTS[checkpointing]) == 2 * 7
    fused_loss, gradients = loss_and_gradients(model)
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert expected[name].any(), name
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 1e-4, name


def test_a_second_pass_skips_the_products_that_end_a_part(quantized, monkeypatch):
    model = adapted(quantized["llama"])
    fuse_lora(model, liger=False, placement=Placement())
    read = []
    weight = fused_lora._Products.weight
    monkeypatch.setattr(
        fused_lora._Products, "weight", lambda self, *args: read.append(1) or weight(self, *args)
    )
    loss_and_gradients(model)
    # Seven products a layer in the forward pass; q, k, v, gate and up in the second; seven back.
    assert len(read) == 2 * (7 + 5 + 7)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
@pytest.mark.parametrize("count", [1, 2])
def test_dense_weights_are_those_that_the_first_layers_read(quantized, count, targets):
    config = LoraConfig(r=4, target_modules=targets)
    model = with_random_adapter(get_peft_model(load_base(quantized["llama"], CPU), config).train())
    fuse_lora(model, liger=False, placement=Placement(2, 2))
    loss, _ = loss_and_gradients(model)
    parameters = model.get_nb_trainable_parameters()
    before = {n: p for n, p in model.named_parameters() if isinstance(p, Params4bit)}
    assert len(before) == 2 * 7
    read = {n for n in before if ".base_layer." in n and int(n.split(".")[4]) < count}
    assert len(read) == count * (7 if targets == "all-linear" else 2)
    values = {n: dequantize(before[n].data, before[n].quant_state) for n in read}
    added = sum(values[n].nbytes - before[n].nbytes for n in read)
    freed = [weakref.ref(x) for n in read for x in (before[n], before[n].quant_state)]
    kept = {n: p for n, p in before.items() if n not in read}
    del before
    assert keep_dense(model, False, count) == added
    assert all(reference() is None for reference in freed)
    after = dict(model.named_parameters())
    assert {n for n, p in after.items() if isinstance(p, Params4bit)} == kept.keys()
    assert all(after[n] is p for n, p in kept.items())
    for name, value in values.items():
        assert torch.equal(after[name], value)
        assert not after[name].requires_grad
    assert model.get_nb_trainable_parameters() == parameters
    assert loss_and_gradients(model)[0] == loss
    # They are what is computed with: a changed one shows in the loss or in the gradients.
    for name in read:
        model.zero_grad()
        found, gradients = loss_and_gradients(model)
        after[name].mul_(1.5)
        model.zero_grad()
        changed, others = loss_and_gradients(model)
        assert changed != found, name
        assert any(not torch.equal(others[n], g) for n, g in gradients.items())


def test_a_pass_that_failed_leaves_nothing_for_the_next(quantized):
    expected = loss_and_gradients(adapted(quantized["qwen2"]))[0]
    model = adapted(quantized["qwen2"])
    fuse_lora(model, liger=False, placement=Placement(2, 2))
    # As after a failure between products that are computed together.
    model.get_base_model().model.layers[0].self_attn.q_proj(torch.ones(1, 3, 64))
    assert loss_and_gradients(model)[0] == pytest.approx(expected, rel=1e-5)


def test_a_model_that_remembers_its_parameters_behaves_as_before():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Dropout()))
    expected = list(model.parameters())
    # Like the base under a new adapter: only the outermost module is in training mode.
    model[1].eval()
    remember_parameters(model)
    for _ in range(2):
        assert all(module.training for module in model.modules())
        assert not any(module.training for module in model.eval().modules())
        model.train()
    assert all(a is b for a, b in zip(model.parameters(), expected, strict=True))
    model(torch.ones(1, 2)).sum().backward()
    assert all(p.grad is not None for p in expected)
    model.zero_grad()
    assert all(p.grad is None for p in expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_mlp_of_another_formula_keeps_it(checkpointing):
    """The MLP of Falcon-H1 has multipliers, and parts named like Llama's."""
    shape = SHAPE | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 1}
    config = AutoConfig.for_model("falcon_h1", mlp_multipliers=[0.5, 0.25], **shape)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lora = LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj"])
    plain = with_random_adapter(get_peft_model(base, lora).train())
    fused = copy.deepcopy(plain)
    assert fuse_lora(fused, liger=False, placement=PLACEMENTS[checkpointing]) == 2 * 3
    (loss, expected), (fused_loss, gradients) = loss_and_gradients(plain), loss_and_gradients(fused)
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() < 1e-4 * expected[name].norm(), name


@pytest.mark.parametrize("targets", [["gate_proj"], ["gate_proj", "up_proj", "down_proj"]])
def test_float32_inputs_under_autocast(targets):
    """What LayerNorm, or a power, leaves under autocast on a GPU."""
    torch.manual_seed(0)
    mlp = LlamaMLP(AutoConfig.for_model("llama", **SHAPE)).bfloat16()
    lora = LoraConfig(r=4, target_modules=targets)
    plain = with_random_adapter(get_peft_model(torch.nn.Sequential(mlp), lora).train())
    fused = copy.deepcopy(plain)
    fuse_lora(fused, liger=False, placement=Placement(2, 2))
    results = []
    for model in (plain, fused):
        x = torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 64).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.float().square().mean().backward()
        assert x.grad.dtype == torch.float32
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        results.append([y.float(), x.grad, *gradients])
    for expected, found in zip(*results, strict=True):
        assert expected.any()
        assert (found - expected).norm() < 0.02 * expected.norm()
