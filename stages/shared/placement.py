"""Placement of a training step's weights and activations: its memory, its time, and the choice.

A placement, for a base with L layers:

    kept_mlp, kept_attention   number of last layers that keep the saved activations of their MLP or
                               attention for the backward pass; the others keep only their input and
                               recompute them
    offload                    the inputs of recomputed layers are kept in host memory
    streamed                   number of layers whose weights are kept in host memory and copied
                               ahead of use (stages/shared/streaming.py)
    tile                       tokens that an MLP computes at once; 0 for all
    dense                      number of first layers whose NF4 weights are kept in 16 bit, instead
                               of being dequantized for each product

The result does not depend on it: the same kernels compute the same products of the same bytes. The
exception is a tile, since products over fewer rows may use another kernel and the adapter's
gradient becomes a sum over tiles; it is used only if nothing else fits.

Dense layers take the room that is left on the card, but for SPARED, if nothing is recomputed,
streamed or in tiles. They change nothing else of the choice, so the model of time leaves them out;
it may then prefer a larger batch_size with fewer dense layers.

Memory. The peak of a step is the maximum over the output head and each layer's backward pass, from
the last to the first, each together with everything that earlier layers keep.

Time. A step takes as long as the slowest of three: its operations, the bytes sent to the GPU, and
those received from it. The operations are 4 a frozen parameter and token (2 forward, 2 backward), 2
more for a recomputed product (except the last of a half, whose result is not needed), and those of
the attention scores. A streamed layer is sent twice a step, except for the SLOTS layers that are
still there when the pass turns around; an offloaded input leaves and returns. The host needs at
least LAUNCHING to launch a layer. RATES is a fast consumer card: 165e12 operations/s in bf16 and
PCIe 4 x16's 25e9 bytes/s each way; on a slower card the copies hide better. Training measures its
own rates.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from stages.shared.decoder_shape import Shape, Training
from stages.shared.vram import Sizes, sizes_of

# Buffers that streamed layers take turns in.
SLOTS = 3

# CUDA context and loaded kernels: on the card but outside the allocator, and larger if tensors are
# offloaded.
CONTEXT = 0.787e9
OFFLOADING_CONTEXT = 0.082e9
# Fragmentation: reserved but unusable memory, relative to those bytes of one layer's backward pass
# that come and go in various orders (not saved activations of other layers, which stack up, nor
# what a single operation allocates and frees, which leaves its hole whole), and parts of pages.
# The first is fitted by `benchmarks.vram fit` on its six points; the second is the least that keeps
# the smallest of them from being predicted more than 2 % under.
FRAGMENTATION = 0.40
PARTS_OF_PAGES = 0.05e9
# It stops growing: single rows of 65,536 and 129,024 tokens left 0.3 and 0.6 GB unused, of 10 and 8
# GB that come and go. gpt-oss, whose eager attention leaves 2.7 GB, is predicted 1.6 % too low.
FRAGMENTED_AT_MOST = 1.5e9
# Layer inputs that are still on the GPU when the forward pass ends: with trl's offloading
# (max_fwd_stash_size), and with that of layers checkpointed in halves (stages/training/offload.py),
# whose last two are still being copied.
OFFLOAD_STASH, PARTS_STASH = 5, 2
# cuBLAS workspaces, allocated by the forward and the backward thread.
WORKSPACES = 0.070e9
# Other host memory of training: libraries, CUDA, the program itself. Between 1.4 and 1.75 GB were
# measured, the most with FlashAttention 4.
PROCESS = 1.58e9
# Seconds per layer and step that the host needs to launch kernels of any size.
LAUNCHING = 8e-3
# Placements within this share of the fastest count as equally fast; then the simplest wins.
ALIKE = 0.03
# Step size for the number of streamed layers to try, as a share of all.
STREAMED_STEPS = 16
TILE = 8192
# Share of the card that dense layers leave free: they gain little in a large step, and running out
# of memory costs more. The GPU memory needed is predicted up to 1.6 % too low.
SPARED = 0.03


@dataclass(frozen=True)
class Rates:
    """Operations/s in bf16, and bytes/s between host and GPU, each way."""

    operations: float = 165e12
    bus: float = 25e9


RATES = Rates()


@dataclass(frozen=True)
class Placement:
    kept_mlp: int = 0
    kept_attention: int = 0
    offload: bool = False
    streamed: int = 0
    tile: int = 0
    dense: int = 0

    @property
    def moving_parts(self) -> int:
        return self.offload + bool(self.streamed) + bool(self.tile)


@dataclass(frozen=True)
class Prediction:
    """Bytes at the peak of a step. `peak`: allocated (allocator and managed memory), `device`: GPU
    memory needed, `host`: host memory needed."""

    moment: str
    weights: float
    adapter: float
    optimizer: float
    activations: float
    logits: float
    workspaces: float
    reserve: float
    host: float

    @property
    def overhead(self) -> float:
        return self.workspaces + self.reserve

    @property
    def device(self) -> float:
        parts = self.weights + self.adapter + self.optimizer + self.activations + self.logits
        return parts + self.overhead

    @property
    def peak(self) -> float:
        return self.device - self.reserve


def as_set(sizes: Sizes) -> Placement:
    """Everything on the GPU, with activations as in `checkpointing` and `offloading`."""
    kept = 0 if sizes.checkpointing else sizes.layers
    return Placement(kept, kept, offload=sizes.offloading)


def predict(sizes: Sizes, placement: Placement) -> Prediction:
    """The parts at the peak of a step."""
    found = list(moments(sizes, placement))
    name, (trained, activations, logits), _ = max(found, key=lambda moment: sum(moment[1]))
    peak = trained + activations + logits
    held = max(
        sum(parts) + min(FRAGMENTATION * mixed, FRAGMENTED_AT_MOST) for _, parts, mixed in found
    )
    context = CONTEXT + OFFLOADING_CONTEXT * (placement.offload or placement.streamed > 0)
    buffers = min(SLOTS, placement.streamed)
    on_host = (placement.streamed - buffers) * sizes.layer_weights
    return Prediction(
        moment=name,
        weights=sizes.weights - on_host + sum(sizes.dense[: placement.dense]),
        adapter=sizes.adapter + trained,
        optimizer=sizes.optimizer,
        activations=activations,
        logits=logits,
        workspaces=WORKSPACES,
        reserve=context + PARTS_OF_PAGES + held - peak,
        host=PROCESS + copied(sizes, placement) + waiting(sizes, placement),
    )


def moments(
    sizes: Sizes, placement: Placement
) -> Iterator[tuple[str, tuple[float, float, float], float]]:
    """(name, (gradients and casts, activations, output head), mixed) of every moment of a step that
    may be the peak. mixed: bytes of a layer's tensors that are freed in various orders."""
    layers, stream, before = sizes.layers, sizes.stream, 0.0
    if sizes.accumulation > 1:
        # Those of earlier micro-steps.
        before = sizes.gradients
    again = recomputes(sizes, placement)
    held = 0.0 if again else sizes.casts
    units = list(_units(sizes, placement))
    inputs = 0.0 if placement.offload else stream
    live = sum(unit.saved if unit.kept else inputs for unit in units)
    if not again:
        live -= sizes.embedded
    beside, always = 0.0, sizes.always
    if placement.offload and again:
        beside = stream * (PARTS_STASH if sizes.halves else OFFLOAD_STASH)
        # The first layer's input never leaves: its gradient is kept with it.
        always += stream
    norm = live + beside + always + sizes.final_norm
    # With the final norm's output.
    scored = norm + stream
    yield "scoring, forward", (before + sizes.casts, scored, sizes.head_forward), 0.0
    yield "scoring, backward", (before + held, scored, sizes.head_backward), 0.0
    final = norm + sizes.final_norm_working
    yield "the final norm, backward", (before + held, final, 0.0), 0.0
    for unit in reversed(units):
        live -= unit.saved if unit.kept else inputs
        gradients = max(before, sizes.gradients * (layers - 1 - unit.layer) / layers)
        casts = sizes.casts * (1 if again else unit.layer + 1) / layers
        own = 0.0
        if not unit.kept:
            # Liger's norm saves the unit's input itself, which is already counted.
            own = 0.0 if sizes.norm_keeps_input else stream
            if placement.offload:
                # Those that left last are gone; the next one is back (trl: the one before is).
                beside = stream
        name = f"the backward pass of layer {unit.layer + 1}"
        for worst, brief in unit.peaks:
            activations = live + beside + own + always + worst
            yield name, (gradients + casts, activations, 0.0), worst - brief
    yield "the optimizer's step", (sizes.gradients, 0.0, 0.0), 0.0


@dataclass(frozen=True)
class _Unit:
    """Half a layer or a whole one, kept or recomputed as a unit. `peaks`: of each half's backward
    pass, all bytes including saved activations, and those that a single operation allocates and
    frees."""

    layer: int
    kept: bool
    saved: float
    peaks: tuple[tuple[float, float], ...]


def _units(sizes: Sizes, placement: Placement) -> Iterator[_Unit]:
    """In the order of the forward pass."""
    attention, mlp = sizes.attention_saved, sizes.mlp_saved
    of_attention = attention + sizes.attention_working, sizes.attention_sums
    of_mlp = mlp + sizes.mlp_working
    if placement.tile:
        # Beside a tile: the whole gradients of input and output.
        tile = placement.tile / sizes.tokens
        of_tile = tile * (of_mlp - sizes.dequantized) + sizes.dequantized + 2 * sizes.stream
    for layer in range(sizes.layers):
        keeps_mlp = layer >= sizes.layers - placement.kept_mlp
        if not sizes.halves:
            brief = sizes.dequantized + sizes.copied_gates
            peaks = (attention + of_mlp, brief), of_attention
            yield _Unit(layer, keeps_mlp, attention + mlp, peaks)
            continue
        keeps_attention = layer >= sizes.layers - placement.kept_attention
        yield _Unit(layer, keeps_attention, attention, (of_attention,))
        worst = of_tile if placement.tile and not keeps_mlp else of_mlp
        yield _Unit(layer, keeps_mlp, mlp, ((worst, sizes.dequantized),))


def recomputes(sizes: Sizes, placement: Placement) -> bool:
    """Whether any layer is recomputed."""
    return min(placement.kept_mlp, placement.kept_attention) < sizes.layers


def copied(sizes: Sizes, placement: Placement) -> float:
    """Bytes of streamed layers in host memory."""
    return placement.streamed * sizes.layer_weights


def waiting(sizes: Sizes, placement: Placement) -> float:
    """Bytes of offloaded inputs in host memory."""
    if not placement.offload:
        return 0.0
    again = sizes.layers - placement.kept_mlp
    if sizes.halves:
        again += sizes.layers - placement.kept_attention
    return again * sizes.stream


def sent_bytes(sizes: Sizes, placement: Placement) -> tuple[float, float]:
    """Bytes a step to the GPU, and from it."""
    weights = 2 * max(0, placement.streamed - SLOTS) * sizes.layer_weights
    inputs = waiting(sizes, placement)
    return weights + inputs, inputs


def copies_hide(sizes: Sizes, placement: Placement, rates: Rates = RATES) -> bool:
    """Whether a step's computation takes longer than its copies."""
    copies = max(sent_bytes(sizes, placement)) / rates.bus
    return copies <= operations(sizes, placement) / rates.operations


def operations(sizes: Sizes, placement: Placement) -> float:
    """Operations of a step."""
    again = (sizes.layers - placement.kept_mlp) * sizes.mlp_operations
    again += (sizes.layers - placement.kept_attention) * sizes.attention_operations
    return 2 * sizes.operations + again


def seconds(sizes: Sizes, placement: Placement, rates: Rates) -> float:
    """Duration of a step, by the model above."""
    computing = operations(sizes, placement) / rates.operations
    copies = max(sent_bytes(sizes, placement)) / rates.bus
    return max(computing, copies, LAUNCHING * sizes.layers)


def choose(
    sizes: Sizes,
    budget: float,
    host: float = float("inf"),
    rates: Rates = RATES,
    kept: str = "auto",
) -> Placement | None:
    """The fastest placement in `budget` bytes of the card and `host` bytes of the machine.

    kept  `auto`, or as train.gradient_checkpointing says: `none` recomputes all layers, `all` none

    None if nothing fits.
    """
    found = list(_fitting(sizes, budget, host, kept))
    if not found:
        return None
    fastest = min(seconds(sizes, placement, rates) for placement in found)
    alike = [p for p in found if seconds(sizes, p, rates) <= (1 + ALIKE) * fastest]
    fewest = min(p.moving_parts for p in alike)
    placed = min(
        (p for p in alike if p.moving_parts == fewest),
        key=lambda p: (seconds(sizes, p, rates), p.streamed),
    )
    if placed.moving_parts or recomputes(sizes, placed):
        return placed

    def fits(dense: int) -> bool:
        return predict(sizes, replace(placed, dense=dense)).device <= (1 - SPARED) * budget

    return replace(placed, dense=_largest(len(sizes.dense), fits))


def resident(sizes: Sizes, kept: str = "auto") -> Placement:
    """The placement with the least GPU memory that has all weights on the card."""
    if kept == "all":
        return Placement(sizes.layers, sizes.layers)
    found = (Placement(offload=offload) for offload in (False, True))
    return min(found, key=lambda placement: predict(sizes, placement).device)


def tightest(sizes: Sizes, kept: str = "auto") -> Placement:
    """The placement with the least GPU memory."""
    all_kept = sizes.layers if kept == "all" else 0
    found = [
        Placement(all_kept, all_kept, offload, streamed, tile)
        for offload in (False, True)[: 1 if all_kept else 2]
        for streamed in (0, sizes.layers)
        for tile in _tiles(sizes, kept)
    ]
    return min(found, key=lambda placement: predict(sizes, placement).device)


def _tiles(sizes: Sizes, kept: str) -> tuple[int, ...]:
    """Tile sizes to try, the best first."""
    return (0, TILE) if sizes.halves and sizes.tokens > TILE and kept != "all" else (0,)


def _fitting(sizes: Sizes, budget: float, host: float, kept: str) -> Iterator[Placement]:
    """For each way to stream, offload and tile that fits, the one that keeps most."""

    def fits(placement: Placement) -> bool:
        prediction = predict(sizes, placement)
        return prediction.device <= budget and prediction.host <= host

    most = {"none": 0}.get(kept, sizes.layers)
    for tile in _tiles(sizes, kept):
        any_fits = False
        for streamed in _counts(sizes.layers):
            for offload in (False, True):
                start = Placement(offload=offload, streamed=streamed, tile=tile)
                if kept == "all":
                    start = replace(start, kept_mlp=most, kept_attention=most, offload=False)
                if not fits(start):
                    continue
                any_fits = True
                if kept == "all":
                    yield start
                    break
                yield _keeping(sizes, start, most, fits)
        if any_fits:
            return


def _counts(layers: int) -> list[int]:
    """Numbers of streamed layers to try."""
    steps = {round(layers * i / STREAMED_STEPS) for i in range(STREAMED_STEPS + 1)}
    return sorted(step for step in steps if step == 0 or step > SLOTS or step == layers)


def _keeping(sizes: Sizes, start: Placement, most: int, fits) -> Placement:
    """`start` with as many MLPs kept as fit, which save most time per byte, then attentions."""
    if start.tile:
        return start
    if not sizes.halves:
        # Families that checkpoint by their own method do so for all layers or none.
        whole = replace(start, kept_mlp=most, kept_attention=most, offload=False)
        return whole if fits(whole) else start
    mlp = _largest(most, lambda n: fits(replace(start, kept_mlp=n)))
    start = replace(start, kept_mlp=mlp)
    attention = _largest(most, lambda n: fits(replace(start, kept_attention=n)))
    placed = replace(start, kept_attention=attention)
    return replace(placed, offload=placed.offload and recomputes(sizes, placed))


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def predict_run(shape: Shape, run: Training) -> Prediction:
    """Prediction for `run` with everything on the GPU."""
    found = sizes_of(shape, run)
    return predict(found, as_set(found))


def methods(shape: Shape, run: Training) -> dict[str, Prediction]:
    """Predictions for full fine-tuning (bf16 weights, gradients, moments), LoRA and QLoRA."""
    full = predict_run(shape, replace(run, method="full", fused_lora=False))
    others = {m: predict_run(shape, replace(run, method=m)) for m in ("lora", "qlora")}
    return {"full": full} | others
