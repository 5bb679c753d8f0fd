"""The placement of weights and activations does not change results on a GPU (pytest -m gpu)."""

import math
from dataclasses import asdict, replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks import placement as benchmark
from benchmarks.vram import alone
from stages.quantize import quantize
from stages.shared import by_layer, streaming
from stages.shared.device import pick_device
from stages.shared.layer_sources import HostCopy, Ring
from stages.shared.model import load_base, load_streamed
from stages.shared.outputs import GB
from stages.shared.placement import SPARED, Placement, predict
from stages.shared.scoring import score
from stages.shared.streaming import Streamer, stream_layers
from stages.training.adjusting import apply_liger
from stages.training.fused_lora import fuse_lora, keep_dense
from stages.training.offload import HostStash
from tests.test_gpu import LENGTHS, liger_put_back, rows
from tests.tiny import make_model

pytestmark = pytest.mark.gpu
LAYERS, HIDDEN = 8, 256
CPU = torch.device("cpu")
ALL = Placement(LAYERS, LAYERS)


@pytest.fixture(scope="module", params=["llama", "qwen2-tied", "llama-16bit"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    arch, _, kind = request.param.partition("-")
    shape = {"hidden_size": HIDDEN, "intermediate_size": 512, "head_dim": 64}
    tied = kind == "tied"
    make_model(folder / "base", arch, **shape, num_hidden_layers=LAYERS, tie_word_embeddings=tied)
    if kind == "16bit":
        return folder / "base"
    (folder / "nf4").mkdir()
    quantize(folder / "base", folder / "nf4", double_quant=True)
    return folder / "nf4"


@pytest.fixture(autouse=True)
def small_weights(monkeypatch):
    monkeypatch.setattr(streaming, "SMALLEST", 1024)


@liger_put_back()
def trained(folder, placement, steps=3, fused=True, dropout=0.0):
    """Losses, the first step's gradients and the adapter after some steps."""
    device, streamer = pick_device(), None
    place = CPU if placement.streamed else device
    base = load_base(folder, place, "varlen", torch.bfloat16)
    if placement.streamed:
        streamer = stream_layers(base, device, placement.streamed)
    apply_liger(base)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules="all-linear")
    model = get_peft_model(base, config).train()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape) * 0.05).to(device)
    if fused:
        stash = HostStash(device, sum(LENGTHS) * HIDDEN * 2) if placement.offload else None
        fuse_lora(model, liger=True, placement=placement, stash=stash, streamer=streamer)
        keep_dense(model, True, placement.dense)
    elif not placement.kept_mlp:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    adapter = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(adapter.values(), lr=1e-2)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    bounds = {f"cu_seq_lens_{x}": ends.to(torch.int32) for x in "qk"}
    bounds |= {f"max_length_{x}": max(LENGTHS) for x in "qk"}
    position = torch.cat([torch.arange(n) for n in LENGTHS])[None].to(device)
    losses, first = [], None
    for step in range(steps):
        ids = (torch.cat(rows())[None].to(device) + step) % 250 + 3
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(input_ids=ids, position_ids=position, **bounds, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
        loss.backward()
        first = first or {name: p.grad.clone() for name, p in adapter.items()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, first, {name: p.detach().clone() for name, p in adapter.items()}


def same(found, expected) -> bool:
    equal = found[0] == expected[0]
    for one, other in zip(found[1:], expected[1:], strict=True):
        equal &= all(torch.equal(value, other[name]) for name, value in one.items())
    return equal


PLACEMENTS = [
    Placement(),
    Placement(offload=True),
    Placement(kept_mlp=3),
    Placement(kept_mlp=5, kept_attention=2, offload=True),
    Placement(LAYERS, LAYERS),
    Placement(LAYERS, LAYERS, dense=LAYERS),
    Placement(LAYERS, LAYERS, dense=3),
    Placement(streamed=LAYERS, offload=True),
    Placement(kept_mlp=5, kept_attention=2, streamed=5),
    Placement(LAYERS, LAYERS, streamed=LAYERS),
]


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_losses_gradients_and_adapter_are_equal(folder, placement):
    assert same(trained(folder, placement), trained(folder, ALL))


@pytest.mark.parametrize("placement", [Placement(streamed=LAYERS), ALL], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_outside_the_fused_path_too(folder, placement, dropout):
    resident = Placement(placement.kept_mlp, placement.kept_attention)
    streamed = Placement(placement.kept_mlp, placement.kept_attention, streamed=LAYERS)
    found = [trained(folder, p, fused=False, dropout=dropout) for p in (streamed, resident)]
    assert same(*found)


def test_a_ring_is_equal_too(folder, monkeypatch):
    monkeypatch.setattr(HostCopy, "__init__", lambda *_: (_ for _ in ()).throw(MemoryError("no")))
    made = []
    init = Ring.__init__
    monkeypatch.setattr(Ring, "__init__", lambda s, *a: made.append(1) or init(s, *a))
    assert same(trained(folder, Placement(streamed=LAYERS)), trained(folder, ALL))
    assert made


@pytest.mark.parametrize("kind", ["copy", "ring", "files"])
@pytest.mark.parametrize("count", [LAYERS, LAYERS // 2])
def test_scores_are_equal_to_the_last_digit(folder, kind, count):
    device = pick_device()
    scored = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in rows()]
    expected = score(load_base(folder, device), scored, 64)
    for slots, room in ((1, 0.0), (3, 1e9)):
        model, streamer = load_streamed(folder, device, count, kind, slots=slots)
        streamer.room = room
        assert score(model, scored, 64, streamer=streamer) == expected
        assert streamer.sent == count


def test_hidden_states_that_move_while_others_compute_are_the_same(folder, monkeypatch):
    """Of many batches in host memory, on a GPU that lags behind; without waiting they differ."""
    device, length = pick_device(), 64
    each = [[(7 * i + j) % 250 + 3 for j in range(length)] for i in range(16)]
    scored = [{"input_ids": row, "labels": row} for row in each]
    expected = score(load_base(folder, device), scored, length)
    compute = by_layer._Batch.compute

    def lagging(self, layer, i):
        torch.cuda._sleep(1_000_000)
        compute(self, layer, i)
        assert self.copies

    monkeypatch.setattr(by_layer._Batch, "compute", lagging)
    model, streamer = load_streamed(folder, device, LAYERS, "copy", slots=1)
    # Room for the two on their way, and for none that stays.
    streamer.room = 2.5 * length * HIDDEN * 2
    assert score(model, scored, length, streamer=streamer) == expected
    fetch, new_empty, delayed = by_layer._Batch.fetch, torch.Tensor.new_empty, []

    def late(self):
        """The first of a pass: 0.1 s late, into memory that has NaN until then."""
        if delayed:
            return fetch(self)
        delayed.append(self)
        with torch.cuda.stream(self.copies):
            torch.cuda._sleep(200_000_000)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_empty", lambda *a: new_empty(*a).fill_(torch.nan))
            fetch(self)

    monkeypatch.setattr(by_layer._Batch, "fetch", late)
    assert score(model, scored, length, streamer=streamer) == expected
    # Up to the delayed batch nothing else waits for the copy, neither the CPU nor the GPU.
    delayed.clear()
    monkeypatch.setattr(by_layer, "wait_for", lambda *_: None)
    found = score(model, scored, length, streamer=streamer)
    assert any(math.isnan(nll) for nll in found.nll)


POINT = benchmark.Point("llama-3.2-1b", 16, 2048, steps=5)


def measured(cap_gb):
    """The point limited to `cap_gb`, in a process of its own."""
    benchmark.POINTS["here"] = replace(POINT, cap_gb=cap_gb)
    return benchmark.measure_point("here")[0]


def test_dense_layers_need_the_memory_that_was_predicted_and_train_alike(monkeypatch):
    # As in every stage.
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    sizes, found = benchmark.sizes_for(POINT), []
    layers = sizes.layers
    for dense in (0, layers // 2, layers):
        placed = Placement(layers, layers, dense=dense)
        prediction = predict(sizes, placed)
        # Half a layer more than it takes.
        budget = (prediction.device + sizes.dense[0] / 2) / (1 - SPARED)
        point = alone(measured, budget / GB)
        assert point["placement"] == asdict(placed)
        assert point["measured_gb"] == pytest.approx(prediction.peak / GB, rel=0.05)
        found.append(point)
    none, half, all_of_them = found
    assert none["losses"] == half["losses"] == all_of_them["losses"]
    added = all_of_them["measured_gb"] - none["measured_gb"]
    assert added == pytest.approx(sum(sizes.dense) / GB, rel=0.05)


def test_a_buffer_that_is_overwritten_too_early_would_be_seen(folder, monkeypatch):
    """Without waiting for what computes with a slot, on a GPU that lags behind."""
    expected = trained(folder, ALL, steps=1)
    enter = Streamer.enter

    def lagging(self, i):
        enter(self, i)
        torch.cuda._sleep(2_000_000)

    monkeypatch.setattr(Streamer, "enter", lagging)
    assert same(trained(folder, Placement(streamed=LAYERS), steps=1), expected)
    monkeypatch.setattr(torch.cuda.Stream, "wait_stream", lambda *_: None)
    assert not same(trained(folder, Placement(streamed=LAYERS), steps=1), expected)


def test_tiles_round_differently_and_little(folder):
    found, expected = (trained(folder, Placement(tile=tile), steps=1) for tile in (64, 0))
    assert found[0] == pytest.approx(expected[0], rel=1e-3)
    for name, gradient in expected[1].items():
        error = (found[1][name] - gradient).norm() / gradient.norm()
        assert error < 2e-2, name
