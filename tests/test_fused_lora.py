"""Fused products on a 16-bit model give the same gradients for every placement, tile and stash."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_fast_path import loss_and_gradients, with_random_adapter
from tiny import SHAPE
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP

from stages.shared.placement import Placement
from stages.training import fused_lora
from stages.training.fused_lora import TorchSwiglu, fuse_lora

KEPT = Placement(2, 2)


def make(family="llama", targets="all-linear", **settings):
    config = AutoConfig.for_model(family, **SHAPE, **settings)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lora = LoraConfig(r=4, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM")
    return with_random_adapter(get_peft_model(base, lora).train())


@pytest.fixture(scope="module")
def biased():
    """A llama whose linears all have biases, with an adapter and PEFT's own gradients."""
    model = make(attention_bias=True, mlp_bias=False)
    for name, parameter in model.named_parameters():
        if name.endswith("proj.base_layer.bias"):
            torch.nn.init.normal_(parameter)
    return model, *loss_and_gradients(copy.deepcopy(model))


def assert_alike(found, expected, tolerance=1e-4):
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert expected[name].any(), name
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < tolerance, name


class Stash:
    """Records which layer inputs were put and taken, in order."""

    def __init__(self):
        self.slots, self.log = [], []

    def slot(self):
        self.slots.append(Slot(self, len(self.slots)))
        return self.slots[-1]


class Slot:
    def __init__(self, stash, number):
        self.stash, self.number = stash, number

    def put(self, tensor):
        self.kept = tensor.detach().clone()
        self.stash.log.append(f"put {self.number}")

    def take(self):
        self.stash.log.append(f"take {self.number}")
        return self.kept


class Streamer:
    """Records which weights are read."""

    def __init__(self):
        self.entered = []

    def entrance(self, parameter):
        return lambda: self.entered.append(id(parameter))


PLACEMENTS = {
    "all kept": (KEPT, 7 + 7, 0),
    "nothing kept": (Placement(), 7 + 5 + 7, 4),
    "an MLP kept": (Placement(kept_mlp=1), None, 3),
    "an attention kept": (Placement(kept_attention=1), None, 3),
    "in tiles": (Placement(tile=5), None, 4),
    "in tiles of which the last is full": (Placement(tile=12), None, 4),
}


@pytest.mark.parametrize("stashed", [False, True])
@pytest.mark.parametrize("case", PLACEMENTS)
def test_every_placement_has_the_gradients_of_peft(biased, case, stashed):
    model, loss, expected = biased
    placement, reads, slots = PLACEMENTS[case]
    model, stash, streamer = copy.deepcopy(model), Stash() if stashed else None, Streamer()
    assert fuse_lora(model, False, placement, stash, streamer) == 2 * 7
    found, gradients = loss_and_gradients(model)
    assert found == pytest.approx(loss, rel=1e-5)
    assert_alike(gradients, expected)
    if reads:
        assert len(streamer.entered) == 2 * reads
    if stashed:
        # Emptied in the reverse of their order.
        assert stash.log == [f"put {i}" for i in range(slots)] + [
            f"take {i}" for i in reversed(range(slots))
        ]
    # A second step as the first.
    model.zero_grad()
    assert loss_and_gradients(model)[0] == found
    model.eval()
    before = list(stash.log) if stash else None
    ids = torch.arange(3, 3 + 2 * 24).view(2, 24)
    assert model(input_ids=ids, labels=ids, use_cache=False).loss.item() == pytest.approx(loss)
    assert (stash.log if stash else None) == before


def test_the_last_layers_are_those_kept(biased):
    """The first layer's MLP and both attentions are computed again."""
    stash, model = Stash(), copy.deepcopy(biased[0])
    fuse_lora(model, False, Placement(kept_mlp=1), stash)
    tensors = []
    for slot in stash.slots:
        slot.put = lambda tensor, own=slot: (
            tensors.append(tensor.detach().clone()) or setattr(own, "kept", tensor.detach().clone())
        )
    seen = []
    layers = model.get_base_model().model.layers
    for norm in (layers[0].input_layernorm, layers[0].post_attention_layernorm):
        norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    layers[1].input_layernorm.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].clone())
    )
    loss_and_gradients(model)
    assert len(tensors) == 3
    assert all(torch.equal(*pair) for pair in zip(tensors, seen[:3], strict=True))


def test_a_family_of_other_layers_is_checkpointed_as_transformers_does():
    settings = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 1}
    targets = ["gate_proj", "up_proj", "down_proj"]
    losses = []
    for placement, checkpointed in ((Placement(), True), (KEPT, False)):
        model = make("falcon_h1", targets, **settings)
        assert not model.is_gradient_checkpointing
        fuse_lora(model, False, placement)
        assert model.is_gradient_checkpointing is checkpointed
        loss, gradients = loss_and_gradients(model)
        assert all(gradient.any() for gradient in gradients.values())
        losses.append(loss)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("targets", [["q_proj"], ["k_proj", "v_proj"], ["down_proj", "o_proj"]])
@pytest.mark.parametrize("placement", [KEPT, Placement()], ids=["kept", "again"])
def test_some_of_the_layers_that_read_together(targets, placement):
    model = make(targets=targets)
    loss, expected = loss_and_gradients(copy.deepcopy(model))
    assert fuse_lora(model, False, placement) == 2 * len(targets)
    found, gradients = loss_and_gradients(model)
    assert found == pytest.approx(loss, rel=1e-5)
    assert_alike(gradients, expected)


def test_a_second_pass_computes_in_the_type_of_the_first():
    model = make().bfloat16()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    results = []
    for placement in (KEPT, Placement()):
        fused = copy.deepcopy(model)
        fuse_lora(fused, False, placement)
        with torch.autocast("cpu", torch.bfloat16):
            ids = torch.arange(3, 3 + 2 * 24).view(2, 24)
            loss = fused(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        results.append({n: p.grad for n, p in fused.named_parameters() if p.requires_grad})
    kept, again = results
    assert {gradient.dtype for gradient in again.values()} == {torch.float32}
    # Recomputation repeats every digit.
    assert all(torch.equal(again[name], gradient) for name, gradient in kept.items())


def test_swiglu_has_the_gradients_of_autograd():
    torch.manual_seed(0)
    g, u, dh = torch.randn(3, 5, 7, dtype=torch.float64).unbind()
    g.requires_grad_(), u.requires_grad_()
    h = torch.nn.functional.silu(g) * u
    expected = torch.autograd.grad(h, (g, u), dh)
    assert torch.equal(TorchSwiglu.forward(g, u), h)
    again, *found = TorchSwiglu.backward(g.detach(), u.detach(), dh)
    assert torch.allclose(again, h)
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))


def test_which_mlps_are_one_operation(monkeypatch):
    def wrapped(mlp, targets):
        lora = LoraConfig(r=2, target_modules=targets)
        return get_peft_model(torch.nn.Sequential(mlp), lora).base_model.model[0]

    parts = ["gate_proj", "up_proj", "down_proj"]
    config = AutoConfig.for_model("llama", **SHAPE)
    assert fused_lora._is_swiglu_mlp(wrapped(LlamaMLP(config), parts))
    assert not fused_lora._is_swiglu_mlp(wrapped(LlamaMLP(config), parts[:2]))
    config.hidden_act = "gelu"
    assert not fused_lora._is_swiglu_mlp(wrapped(LlamaMLP(config), parts))

    class Clamped(LlamaMLP):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(-1, 1))

    config.hidden_act = "silu"
    assert not fused_lora._is_swiglu_mlp(wrapped(Clamped(config), parts))
    assert not fused_lora._is_swiglu_mlp(torch.nn.Linear(2, 2))
    # Liger puts its own class into transformers' module before layers are fused.
    monkeypatch.setattr(modeling_llama, "LlamaMLP", Clamped)
    assert fused_lora._is_swiglu_mlp(wrapped(LlamaMLP(config), parts))


def test_a_result_that_nothing_reads_takes_no_memory():
    found = fused_lora._unread(torch.ones(2, dtype=torch.bfloat16), (1000, 1000))
    assert (found.shape, found.dtype) == ((1000, 1000), torch.bfloat16)
    assert found.untyped_storage().nbytes() == 2
