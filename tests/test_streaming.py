"""Weights that wait in host memory: what is computed does not change.

On the CPU the buffers are filled at once, so that a layer that was not asked for again computes
with another one's weights, as it would on a GPU.
"""

import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model

from stages.quantize import quantize
from stages.shared import layer_sources, streaming
from stages.shared.expert_lora import stand_ins, target_parameters, use_factors
from stages.shared.layer_sources import HostCopy, Ring
from stages.shared.model import load_base
from stages.shared.packed import Packed
from stages.shared.placement import SLOTS, Placement
from stages.shared.scoring import score
from stages.shared.streaming import Streamer, spread, stream_layers
from stages.training.fused_lora import fuse_lora, keep_dense
from tests.test_fast_path import with_random_adapter
from tests.tiny import make_model

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
LAYERS = 6
SHAPE = {"num_hidden_layers": LAYERS, "hidden_size": 128, "intermediate_size": 256}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


@pytest.fixture(autouse=True)
def small_weights(monkeypatch):
    monkeypatch.setattr(streaming, "SMALLEST", 1024)
    # There is no driver to lock memory.
    monkeypatch.setattr(layer_sources, "lock", lambda buffer: None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for arch, kind in itertools.product(("llama", "gemma", "qwen3_moe"), ("nf4", "16 bit")):
        folder = tmp_path_factory.mktemp(f"{arch}")
        make_model(folder / "base", arch, **SHAPE | (EXPERTS if "moe" in arch else {}))
        made[arch, kind] = folder / "base"
        if kind == "nf4":
            (folder / "nf4").mkdir()
            quantize(folder / "base", folder / "nf4", double_quant=True)
            made[arch, kind] = folder / "nf4"
    return made


def trained(folder, placement, fused, steps=3, targets="all-linear", ring=False, experts=False):
    """Losses, gradients of the first step and the adapter after some steps."""
    # In float32 RMSNorm reads its input twice, and three gradients add up in another order.
    model, streamer = load_base(folder, CPU, None, torch.bfloat16), None
    if placement.streamed:
        streamer = stream_layers(model, CPU, placement.streamed)
        assert isinstance(streamer.source, Ring if ring else HostCopy)
    parameters = target_parameters(model) if experts else None
    config = LoraConfig(r=4, lora_alpha=12, target_modules=targets, target_parameters=parameters)
    with stand_ins(model):
        peft = with_random_adapter(get_peft_model(model, config).train())
    use_factors(peft)
    if fused:
        fuse_lora(peft, liger=False, placement=placement, streamer=streamer)
        keep_dense(peft, False, placement.dense)
    elif placement.kept_mlp < LAYERS:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        peft.enable_input_require_grads()
    adapter = {n: p for n, p in peft.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(adapter.values(), lr=1e-2)
    losses, first = [], None
    for step in range(steps):
        ids = (torch.arange(2 * 24) * (step + 3) % 257 + 3).view(2, 24)
        loss = peft(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        first = first or {name: p.grad.clone() for name, p in adapter.items()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, first, {name: p.detach().clone() for name, p in adapter.items()}


def same(found, expected):
    assert found[0] == expected[0]
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("fused", [True, False])
def test_held_out_rows_pass_through_the_streamed_weights_once(folders, fused):
    """As training scores them, in several batches."""
    rows = [{"input_ids": ids, "labels": ids} for ids in ([*range(3, 20 + n)] for n in range(8))]
    found = []
    for count in (0, LAYERS):
        model, streamer = load_base(folders["llama", "nf4"], CPU, None, torch.bfloat16), None
        if count:
            streamer = stream_layers(model, CPU, count)
        peft = with_random_adapter(get_peft_model(model, LoraConfig(r=4)).train())
        if fused:
            fuse_lora(peft, liger=False, placement=Placement(streamed=count), streamer=streamer)
        before = streamer.sent if streamer else 0
        found.append(score(peft, rows, tokens_per_batch=48, streamer=streamer))
        assert peft.training
    assert found[0] == found[1]
    assert streamer.sent - before <= LAYERS


KEPT = Placement(LAYERS, LAYERS)


@pytest.mark.parametrize(
    "placement",
    [
        Placement(),
        Placement(kept_mlp=2),
        Placement(kept_mlp=4, kept_attention=1),
        Placement(kept_attention=3),
        Placement(streamed=6),
        Placement(streamed=4, kept_mlp=3),
        Placement(LAYERS, LAYERS, streamed=6),
        Placement(LAYERS, LAYERS, streamed=1),
        Placement(LAYERS, LAYERS, dense=LAYERS),
        Placement(LAYERS, LAYERS, dense=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["nf4", "16 bit"])
def test_where_things_lie_changes_no_bit_of_the_fused_path(folders, kind, placement):
    folder = folders["llama", kind]
    same(trained(folder, placement, True), trained(folder, KEPT, True))


@pytest.mark.parametrize("placement", [Placement(streamed=6), Placement(6, 6, streamed=5)], ids=str)
@pytest.mark.parametrize("arch", ["llama", "gemma"])
@pytest.mark.parametrize("kind", ["nf4", "16 bit"])
def test_a_family_outside_the_fused_path_streams_too(folders, arch, kind, placement):
    folder = folders[arch, kind]
    resident = Placement(placement.kept_mlp, placement.kept_attention)
    same(trained(folder, placement, False), trained(folder, resident, False))


def test_layers_without_an_adapter_stream_too(folders):
    """Their products are autograd's own, with the weights that it noted."""
    folder, targets = folders["llama", "nf4"], ["q_proj", "v_proj"]
    for placement in (Placement(streamed=6), Placement(6, 6, streamed=6)):
        resident = Placement(placement.kept_mlp, placement.kept_attention)
        same(
            trained(folder, placement, True, targets=targets),
            trained(folder, resident, True, targets=targets),
        )


@pytest.mark.parametrize("placement", [Placement(streamed=6), Placement(6, 6, streamed=5)], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "16 bit"])
def test_experts_stream_as_the_rest(folders, kind, placement):
    folder, targets = folders["qwen3_moe", kind], ["q_proj", "v_proj"]
    resident = Placement(placement.kept_mlp, placement.kept_attention)
    same(
        trained(folder, placement, False, targets=targets),
        trained(folder, resident, False, targets=targets),
    )


@pytest.mark.parametrize("placement", [Placement(streamed=6), Placement(6, 6, streamed=5)], ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_adapters_of_streamed_experts_learn_as_those_of_resident_ones(folders, fused, placement):
    folder, targets = folders["qwen3_moe", "nf4"], ["q_proj", "v_proj"]
    resident = Placement(placement.kept_mlp, placement.kept_attention)
    found, expected = (
        trained(folder, where, fused, targets=targets, experts=True)
        for where in (placement, resident)
    )
    # A and B of both tensors of every layer.
    assert sum("experts" in name and grad.any() for name, grad in expected[1].items()) == 4 * LAYERS
    same(found, expected)


def test_packed_experts_are_what_is_streamed(folders):
    model = load_base(folders["qwen3_moe", "nf4"], CPU)
    codes = {id(m.codes) for m in model.modules() if isinstance(m, Packed)}
    streamer = stream_layers(model, CPU, LAYERS)
    assert codes
    assert codes <= {id(parameter) for layer in streamer.layers for parameter in layer}


def test_memory_that_cannot_be_locked_leaves_a_ring(folders, monkeypatch):
    monkeypatch.setattr(layer_sources, "lock", lambda buffer: "refused")
    for placement in (Placement(streamed=6), Placement(3, 2, streamed=6)):
        same(
            trained(folders["llama", "nf4"], placement, True, ring=True),
            trained(folders["llama", "nf4"], KEPT, True),
        )


@pytest.mark.parametrize(("arch", "kept"), [("llama", 0), ("llama", LAYERS), ("qwen3_moe", LAYERS)])
def test_a_layer_that_is_not_asked_for_again_would_be_seen(folders, monkeypatch, arch, kept):
    """Without the calls of the backward pass it multiplies by another layer's weights."""
    going_up = {"furthest": -1}
    enter = Streamer.enter

    def only_up(self, i):
        if i >= going_up["furthest"]:
            going_up["furthest"] = i
            enter(self, i)

    targets, folder = ["q_proj", "v_proj"], folders[arch, "nf4"]
    expected = trained(folder, KEPT, True, 1, targets)
    monkeypatch.setattr(Streamer, "enter", only_up)
    found = trained(folder, Placement(kept, kept, streamed=6), True, 1, targets)
    assert found[0] == expected[0]
    assert any(not torch.equal(found[1][n], expected[1][n]) for n in expected[1])


def test_a_pass_sends_every_layer_once_but_those_that_are_still_there(folders):
    model = load_base(folders["llama", "nf4"], CPU)
    streamer = stream_layers(model, CPU, LAYERS)
    for passes in range(3):
        order = range(LAYERS) if passes % 2 == 0 else reversed(range(LAYERS))
        for i in order:
            streamer.enter(i)
        assert streamer.sent == LAYERS + passes * (LAYERS - SLOTS)


def test_another_process_maps_the_same_copy(folders):
    layers = [[torch.nn.Parameter(torch.randn(7, 40))], [torch.nn.Parameter(torch.randn(2000))]]
    mine = HostCopy(layers, None)
    empty = [[torch.nn.Parameter(torch.empty_like(p)) for p in layer] for layer in layers]
    other = HostCopy(empty, None, mine.path)
    assert all(torch.equal(a, b) for a, b in zip(mine.layers, other.layers, strict=True))
    mine.layers[0].fill_(3)
    assert (other.layers[0] == 3).all()


@pytest.mark.parametrize("count", [1, 3, 7, 8])
def test_streamed_layers_are_spread(count):
    chosen = spread(count, 8)
    assert len(set(chosen)) == count
    gaps = [b - a for a, b in itertools.pairwise(chosen)]
    assert max(gaps, default=1) - min(gaps, default=1) <= 1
