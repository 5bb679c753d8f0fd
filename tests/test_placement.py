"""Where things lie: what is chosen fits, is the fastest, and is what the memory model says.

No model is made: sizes of shapes are all that placement.py knows. The GPU's part is in
tests/test_gpu_placement.py.
"""

from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.shared import placement
from stages.shared.base_bytes import NF4_BYTES
from stages.shared.decoder_shape import Linear, Shape, Training
from stages.shared.outputs import GB
from stages.shared.placement import (
    ALIKE,
    RATES,
    SLOTS,
    SPARED,
    Placement,
    Rates,
    choose,
    predict,
    seconds,
)
from stages.shared.vram import Sizes, sizes_of
from stages.training.placing import describe

FORMS = {
    # layers, hidden, intermediate, heads, kv heads, vocabulary
    "small": (6, 256, 512, 4, 2, 4000),
    "wide": (6, 1024, 16384, 8, 1, 4000),
    "7b": (32, 4096, 11008, 32, 32, 32000),
    "70b": (80, 8192, 28672, 64, 8, 32000),
}


@cache
def shape(name: str, plain: bool = True) -> Shape:
    layers, hidden, intermediate, heads, kv_heads, vocabulary = FORMS[name]
    narrow = hidden // heads * kv_heads
    widths = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, narrow),
        "self_attn.v_proj": (hidden, narrow),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, intermediate),
        "mlp.up_proj": (hidden, intermediate),
        "mlp.down_proj": (intermediate, hidden),
    }
    return Shape(
        layers=layers,
        vocabulary=vocabulary,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        swiglu=True,
        plain=plain,
        linears=tuple(
            Linear(f"model.layers.{layer}.{name}", *size)
            for layer in range(layers)
            for name, size in widths.items()
        ),
        other_parameters=2 * vocabulary * hidden + (2 * layers + 1) * hidden,
    )


@cache
def sizes(name: str, tokens: int = 4096, plain: bool = True, **changes) -> Sizes:
    """A packed QLoRA step of `tokens` with every fused part, unless `changes` say otherwise."""
    model = shape(name, plain)
    return sizes_of(model, replace(run_of(model), **changes, tokens=tokens, learned_tokens=tokens))


def run_of(model: Shape) -> Training:
    return Training(
        method="qlora",
        double_quant=True,
        rank=16,
        targets=frozenset(x.name for x in model.linears),
        dropout=0.0,
        optimizer="adamw_torch_fused",
        rows=1,
        sequences=2,
        tokens=4096,
        learned_tokens=4096,
        accumulation=1,
        checkpointing=True,
        offloading=False,
        attention="varlen",
        liger=True,
        fused_lora=True,
    )


STEPS = {
    "small": ("small", {}),
    "small, in whole layers": ("small", {"plain": False}),
    "small, without Liger": ("small", {"liger": False}),
    "small, PEFT's own layers": ("small", {"fused_lora": False}),
    "small, accumulating": ("small", {"accumulation": 4, "rank": 64}),
    "small, 16 bit": ("small", {"method": "lora"}),
    "7b": ("7b", {}),
    "7b, one long row": ("7b", {"tokens": 32768, "sequences": 1}),
    "70b": ("70b", {}),
}
steps = st.sampled_from([*STEPS]).map(lambda name: sizes(STEPS[name][0], **STEPS[name][1]))
kinds = st.sampled_from(["auto", "none", "all"])


def budgets(found: Sizes, kept: str) -> tuple[float, float]:
    """From too little for anything to more than enough for everything."""
    least = predict(found, placement.tightest(found, kept)).device
    most = predict(found, Placement(found.layers, found.layers)).device
    return 0.9 * least, 1.1 * max(least, most)


def at(found: Sizes, kept: str, share: float) -> float:
    low, high = budgets(found, kept)
    return low + share * (high - low)


def as_long(found: Sizes, placed: Placement, other: Placement, rates: Rates = RATES) -> bool:
    """Whether `placed` is not slower than `other`, within the tolerance."""
    mine, theirs = (seconds(found, p, rates) for p in (placed, other))
    return mine <= theirs * (1 + ALIKE) * (1 + 1e-9)


@settings(deadline=None, max_examples=60)
@given(steps, kinds, st.floats(0, 1))
def test_what_is_chosen_fits_and_is_what_was_asked_for(found, kept, share):
    budget = at(found, kept, share)
    placed = choose(found, budget, kept=kept)
    if placed is None:
        assert predict(found, placement.tightest(found, kept)).device > budget
        return
    assert predict(found, placed).device <= budget
    assert 0 <= placed.kept_mlp <= found.layers
    assert 0 <= placed.kept_attention <= found.layers
    assert 0 <= placed.streamed <= found.layers
    if kept == "none":
        assert placed.kept_mlp == placed.kept_attention == 0
    if kept == "all":
        assert placed.kept_mlp == placed.kept_attention == found.layers
    # If nothing is recomputed, no inputs are needed.
    assert placement.recomputes(found, placed) or not placed.offload
    if not found.halves:
        # Such families checkpoint by their own method: all layers or none.
        assert placed.kept_mlp == placed.kept_attention in (0, found.layers)


@settings(deadline=None, max_examples=60)
@given(steps, kinds, st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted))
def test_a_larger_card_is_never_slower(found, kept, shares):
    smaller, larger = (choose(found, at(found, kept, share), kept=kept) for share in shares)
    if smaller is not None:
        assert larger is not None
        assert as_long(found, larger, smaller)


@settings(deadline=None, max_examples=60)
@given(steps, kinds, st.floats(0, 1), st.floats(0, 1))
def test_host_memory_is_kept_to(found, kept, share, of_host):
    budget = at(found, kept, share)
    free = choose(found, budget, kept=kept)
    if free is None:
        return
    host = placement.PROCESS + of_host * (predict(found, free).host - placement.PROCESS)
    placed = choose(found, budget, host, kept=kept)
    if placed is not None:
        assert predict(found, placed).host <= host
        assert predict(found, placed).device <= budget
        # Fewer combinations.
        assert as_long(found, free, placed)


@pytest.mark.parametrize("step", ["7b", "7b, one long row", "70b"])
def test_a_step_that_a_machine_without_spare_memory_cannot_take_is_none(step):
    name, changes = STEPS[step]
    found = sizes(name, **changes)
    tightest = placement.tightest(found)
    needed = predict(found, tightest)
    assert choose(found, needed.device, needed.host) is not None
    assert choose(found, needed.device, placement.PROCESS) is None


def every_placement(found: Sizes, kept: str):
    """All placements to choose from, with coarser steps of kept layers to save time."""
    layers = found.layers
    amounts = {"none": [0], "all": [layers]}.get(kept, sorted({0, 1, layers // 2, layers}))
    tiles = (0, placement.TILE) if found.halves and found.tokens > placement.TILE else (0,)
    for tile in tiles:
        for streamed in {0, min(SLOTS + 1, layers), layers}:
            for mlp in amounts:
                for attention in amounts if found.halves else [mlp]:
                    placed = Placement(mlp, attention, streamed=streamed, tile=tile)
                    yield placed
                    if placement.recomputes(found, placed):
                        yield replace(placed, offload=True)


@pytest.mark.parametrize("kept", ["auto", "none", "all"])
@pytest.mark.parametrize("step", STEPS)
def test_nothing_takes_less_than_the_tightest(step, kept):
    name, changes = STEPS[step]
    found = sizes(name, **changes)
    tightest = placement.tightest(found, kept)
    least = predict(found, tightest).device
    assert all(predict(found, placed).device >= least for placed in every_placement(found, kept))
    assert choose(found, 0.999 * least, kept=kept) is None
    # Nor does any placement with all weights on the card need less than `resident`.
    resident = predict(found, placement.resident(found, kept)).device
    for placed in every_placement(found, kept):
        if not placed.streamed and not placed.tile:
            assert predict(found, placed).device >= resident


@pytest.mark.parametrize("step", ["small", "small, in whole layers", "7b", "70b"])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.8])
def test_no_other_placement_that_fits_is_faster(step, share):
    """Within the tolerance: the choice is a search, and this tries all."""
    name, changes = STEPS[step]
    found = sizes(name, **changes)
    budget = at(found, "auto", share)
    placed = choose(found, budget)
    for other in every_placement(found, "auto"):
        if predict(found, other).device <= budget:
            assert as_long(found, placed, other), other


def test_a_70b_model_streams_every_layer_through_a_card_of_12_gb():
    found = sizes("70b")
    placed = choose(found, 12 * GB)
    assert placed.streamed == 80
    prediction = predict(found, placed)
    # 34 GB wait on the host; what is on the card of the layers are the buffers.
    assert prediction.weights < found.weights - 70 * found.layer_weights
    assert prediction.host > 80 * found.layer_weights
    assert placement.copies_hide(found, placed)


def test_a_7b_model_keeps_everything_on_a_card_of_24_gb():
    found = sizes("7b")
    placed = choose(found, 24 * GB)
    assert replace(placed, dense=0) == Placement(32, 32)
    assert 0 < placed.dense < 32
    # And recomputes on a card that it fills.
    assert placement.recomputes(found, choose(found, 12 * GB))


@settings(deadline=None, max_examples=60)
@given(steps, kinds, st.floats(0, 1.5))
def test_dense_layers_take_what_is_left_and_change_nothing_else(found, kept, share):
    budget = at(found, kept, share)
    placed = choose(found, budget, kept=kept)
    without = choose(replace(found, dense=()), budget, kept=kept)
    if placed is None:
        assert without is None
        return
    assert replace(placed, dense=0) == without
    assert predict(found, placed).device <= budget
    if without.moving_parts or placement.recomputes(found, without):
        assert placed.dense == 0
    elif placed.dense < len(found.dense):
        more = replace(placed, dense=placed.dense + 1)
        assert predict(found, more).device > (1 - SPARED) * budget
    if placed.dense:
        assert predict(found, placed).device <= (1 - SPARED) * budget


@pytest.mark.parametrize("step", STEPS)
def test_dense_layers_are_of_fused_products_of_nf4_weights(step):
    name, changes = STEPS[step]
    found = sizes(name, **changes)
    placed = choose(found, 1e15)
    packed = changes.get("method") != "lora" and changes.get("fused_lora", True)
    assert placed.dense == (found.layers if packed else 0)
    assert "in 16 bit" in describe(placed, found) or not packed
    one = predict(found, replace(placed, dense=1)).device / (1 - SPARED)
    assert choose(found, (1 + 1e-9) * one).dense == min(1, placed.dense)
    assert choose(found, (1 - 1e-9) * one).dense == 0


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_dense_layer_adds_its_16_bit_weights_without_their_nf4_bytes(double_quant):
    """Of Linears with an adapter that NF4 replaces, layer by layer."""
    model = shape("small")
    layer = 256 * (256 + 128 + 128 + 256) + 3 * 256 * 512
    unlike = tuple(
        # What has no adapter, is not quantized, or is outside of layers.
        replace(x, quantized="layers.1." not in x.name or x.short != "q_proj")
        for x in model.linears
    )
    targets = {x.name for x in unlike if "layers.5.mlp" not in x.name} | {"lm_head"}
    run = {"double_quant": double_quant, "targets": frozenset(targets)}
    model = replace(model, linears=(*unlike, Linear("lm_head", 256, 4000)))
    found = sizes_of(model, replace(run_of(shape("small")), **run))
    each = 2 - NF4_BYTES[double_quant]
    left_out = {1: 256 * 256, 5: 3 * 256 * 512}
    expected = [each * (layer - left_out.get(i, 0)) for i in range(6)]
    assert found.dense == pytest.approx(expected)
    for count in range(7):
        more, less = (predict(found, Placement(6, 6, dense=n)) for n in (count, 0))
        for part in ("weights", "device", "peak"):
            added = getattr(more, part) - getattr(less, part)
            assert added == pytest.approx(sum(expected[:count])), part
        assert (more.host, more.reserve) == pytest.approx((less.host, less.reserve))


def test_equally_fast_placements_have_few_moving_parts():
    """A step with few tokens is limited by launching kernels, so copies gain nothing."""
    found = sizes("7b", tokens=64)
    everything = predict(found, Placement(32, 32)).device
    assert choose(found, everything) == Placement(32, 32)
    # With a little less, half a layer is recomputed, although streaming a layer would do too.
    placed = choose(found, everything - 1)
    assert placed.moving_parts == 0
    assert min(placed.kept_mlp, placed.kept_attention) < 32


def test_weights_are_streamed_where_that_is_faster():
    """With a slow bus, recomputing is cheaper than copying; with a fast one, copying is."""
    found = sizes("7b", tokens=2048)
    budget = predict(found, Placement()).device
    on_fast, on_slow = (choose(found, budget, rates=Rates(bus=rate)) for rate in (400e9, 0.4e9))
    assert on_fast.streamed > on_slow.streamed == 0
    assert on_fast.kept_mlp > on_slow.kept_mlp


def test_a_tile_is_used_only_where_nothing_else_fits():
    found = sizes("wide", tokens=65536)
    least = predict(found, placement.tightest(found)).device
    tiled = set()
    for share in (1.0, 1.05, 1.2, 1.5, 2.0, 4.0):
        fits = [
            p for p in every_placement(found, "auto") if predict(found, p).device <= share * least
        ]
        placed = choose(found, share * least)
        assert bool(placed.tile) == all(p.tile for p in fits)
        tiled.add(bool(placed.tile))
    assert tiled == {True, False}


def test_a_copy_hides_where_the_step_computes_for_longer():
    for tokens, hides in ((4096, True), (256, False)):
        found = sizes("70b", tokens=tokens)
        streamed = Placement(streamed=80)
        assert placement.copies_hide(found, streamed) == hides
        slow, fast = (seconds(found, p, RATES) for p in (streamed, Placement()))
        assert (slow > fast) == (not hides)
        # 2 passes, except for buffers that still have their layer when the pass turns around.
        sent, back = placement.sent_bytes(found, streamed)
        assert sent == 2 * (80 - SLOTS) * found.layer_weights
        assert back == 0


def test_inputs_that_wait_on_the_host_go_there_and_back():
    found = sizes("small")
    placed = Placement(kept_mlp=2, kept_attention=5, offload=True)
    waiting = ((6 - 2) + (6 - 5)) * found.stream
    assert placement.sent_bytes(found, placed) == (waiting, waiting)
    assert predict(found, placed).host == placement.PROCESS + waiting


@pytest.mark.parametrize(
    ("less", "more"),
    [
        # The last MLP's activations are there at the peak in any case.
        (Placement(), Placement(kept_mlp=2)),
        (Placement(kept_attention=2), Placement(kept_attention=3)),
        (Placement(streamed=32), Placement(streamed=31)),
        (Placement(offload=True), Placement()),
        (Placement(4, 4, streamed=6), Placement(4, 4)),
    ],
    ids=str,
)
def test_each_way_saves_memory(less, more):
    found = sizes("7b")
    assert predict(found, less).device < predict(found, more).device


def simulated(found: Sizes, placed: Placement) -> float:
    """Peak of a step that is walked through allocation by allocation, in bytes.

    Written from the description of what training does (stages/training/fused_lora.py): a stack of
    what each half saved, pushed in the forward pass and popped in the backward pass.
    """
    on_gpu = {"inputs": 0.0 if placed.offload else found.stream}
    stack = []
    for layer in range(found.layers):
        from_end = found.layers - layer
        for kept, saved, working in (
            (placed.kept_attention, found.attention_saved, found.attention_working),
            (placed.kept_mlp, found.mlp_saved, found.mlp_working),
        ):
            keeps = from_end <= kept
            size = saved if keeps else on_gpu["inputs"]
            stack.append((layer, keeps, size, saved + working))
    again = any(not keeps for _, keeps, _, _ in stack)
    offloads = placed.offload and again
    # The embeddings' result is a leaf of the graph, which holds it, or without recomputation no
    # part of it.
    embedded = offloads - (not again)
    leaving, returned = placement.PARTS_STASH * offloads, 0
    peaks = []
    held = sum(size for _, _, size, _ in stack) + found.always + embedded * found.stream
    normed = held + leaving * found.stream + found.final_norm
    peaks.append(normed + found.stream + found.head_forward)
    peaks.append(normed + found.stream + found.head_backward)
    peaks.append(normed + found.final_norm_working)
    while stack:
        layer, keeps, size, worst = stack.pop()
        held -= size
        if offloads and not keeps:
            # Its own input came back, which the norm saves again, and the next one sets out.
            leaving, returned = 0, 1
        gradients = found.gradients * (found.layers - 1 - layer) / found.layers
        peaks.append(held + (leaving + returned) * found.stream + worst + gradients)
    peaks.append(found.gradients)
    on_card = found.layers - placed.streamed + min(SLOTS, placed.streamed)
    weights = found.weights - (found.layers - on_card) * found.layer_weights
    return weights + found.adapter + found.optimizer + placement.WORKSPACES + max(peaks)


@settings(deadline=None, max_examples=200)
@given(
    st.integers(0, 6),
    st.integers(0, 6),
    st.booleans(),
    st.integers(0, 6),
    st.sampled_from([64, 8192]),
)
def test_the_walk_is_that_of_a_simulated_step(mlp, attention, offload, streamed, tokens):
    found = sizes("small", tokens=tokens)
    placed = Placement(mlp, attention, offload and min(mlp, attention) < 6, streamed)
    assert predict(found, placed).peak == pytest.approx(simulated(found, placed), rel=1e-9)


def test_the_parts_are_the_whole():
    for step, (name, changes) in STEPS.items():
        found = sizes(name, **changes)
        for placed in every_placement(found, "auto"):
            prediction = predict(found, placed)
            parts = ("weights", "adapter", "optimizer", "activations", "logits", "overhead")
            total = sum(getattr(prediction, part) for part in parts)
            assert total == pytest.approx(prediction.device), (step, placed)
            assert prediction.peak == pytest.approx(prediction.device - prediction.reserve)
            assert min(getattr(prediction, part) for part in parts) >= 0
