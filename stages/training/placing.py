"""Chooses the placement of weights and activations on the machine that trains.

No result depends on it: the same params give the same adapter on every card.
"""

import importlib.util
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from stages.shared import placement
from stages.shared.card import card_budget
from stages.shared.decoder_shape import Shape
from stages.shared.host_memory import available_bytes, pinned
from stages.shared.layer_sources import RING
from stages.shared.model import load_base, load_streamed
from stages.shared.outputs import GB
from stages.shared.params import Params
from stages.shared.placement import Placement, Prediction, Rates
from stages.shared.process import StageError
from stages.shared.ranks import ALONE, World
from stages.shared.streaming import Streamer
from stages.shared.vram import Sizes, sizes_of
from stages.shared.workload import KEPT, Lengths, planned_training, shape_of

# Environment variable: share of the card to leave free, after an attempt that did not fit.
TIGHTER, TIGHTER_SHARE = "TRAIN_TIGHTER", 0.1
# A rank writes this key into the store when it runs out of GPU memory.
OUT_OF_MEMORY = "out of memory"
# Size of the copies and of the square products that measure the rates.
PROBE_BYTES, PROBE_SIZE, PROBE_RUNS = 2**26, 4096, 8


@dataclass(frozen=True)
class Placed:
    """A placement and its basis. `prediction` and `budget` (bytes) are None on the CPU, where
    everything is in host memory."""

    placement: Placement
    prediction: Prediction | None = None
    budget: float | None = None
    rates: Rates | None = None
    # Host memory has no room for a copy of streamed weights, so they are read from their files.
    ring: bool = False

    def metrics(self, fused: bool) -> dict[str, float]:
        """For metrics/train_cost.json: placement, prediction and measured rates.

        fused  whether the trial accepted the fused products, which alone read dense layers
        """
        if not (self.prediction and self.rates):
            return {}
        return {
            "kept_mlp_layers": self.placement.kept_mlp,
            "kept_attention_layers": self.placement.kept_attention,
            "offloaded_inputs": int(self.placement.offload),
            "streamed_layers": self.placement.streamed,
            "mlp_tile_tokens": self.placement.tile,
            "dense_layers": self.placement.dense if fused else 0,
            "predicted_peak_vram_gb": self.prediction.peak / GB,
            "predicted_device_gb": self.prediction.device / GB,
            "predicted_ram_gb": self.prediction.host / GB,
            "bus_gb_per_second": self.rates.bus / GB,
        }


def place(
    params: Params,
    config: PretrainedConfig,
    rows: Lengths,
    device: torch.device,
    world: World = ALONE,
    leave: float = 0.0,
) -> Placed:
    """The fastest placement that fits the device now, printed.

    params  of one rank
    leave   share of the free memory to leave, after an attempt that did not fit
    """
    layers = config.get_text_config().num_hidden_layers
    if device.type == "cpu":
        kept = 0 if params.train.gradient_checkpointing is True else layers
        return Placed(Placement(kept, kept))
    shape = shape_of(config)
    sizes = run_sizes(config, shape, params, rows, world.size)
    # All ranks choose the same: for the smallest budget, with the first rank's rates.
    budget = min(world.gather(card_budget() * (1 - leave)))
    host = available_bytes() + placement.PROCESS
    rates, kept = world.same(measured_rates(device)), KEPT[params.train.gradient_checkpointing]
    placed = placement.choose(sizes, budget, host, rates, kept)
    ring = placed is None
    if placed is None:
        placed = placement.choose(sizes, budget, rates=rates, kept=kept)
        if placed and (needed := ring_bytes(sizes, placed)) > host:
            raise no_host_memory(needed)
    # Predictions may be wrong, so the smallest placement is tried anyway.
    placed = placed or placement.tightest(sizes, kept)
    prediction = placement.predict(sizes, placed)
    print(
        f"train: {describe(placed, sizes)}; {prediction.device / GB:.2f} GB of the card predicted, "
        f"{budget / GB:.2f} GB free; host and GPU exchange {rates.bus / GB:.0f} GB/s",
        flush=True,
    )
    if ring and placed.streamed:
        print(
            "train: streamed weights are read from their files, since host memory is too small",
            flush=True,
        )
    if hint := faster(config, shape, params, rows, world.size, budget, host, rates):
        print(f"train: {hint}", flush=True)
    return Placed(placed, prediction, budget, rates, ring)


def run_sizes(
    config: PretrainedConfig, shape: Shape, params: Params, rows: Lengths, ranks: int = 1
) -> Sizes:
    """The sizes of this run on each of `ranks` GPUs, with its base and the installed kernels."""
    quantization = getattr(config, "quantization_config", None) or {}
    double_quant = bool(quantization.get("bnb_4bit_use_double_quant"))
    run = planned_training(config, shape, params, rows, bool(quantization), double_quant)
    installed = importlib.util.find_spec("liger_kernel") is not None
    sizes = sizes_of(shape, replace(run, liger=run.liger and installed))
    # DDP's buckets hold a second copy of the gradients.
    buckets = sizes.gradients if ranks > 1 else 0.0
    return replace(sizes, always=sizes.always + buckets)


def describe(placed: Placement, sizes: Sizes) -> str:
    """A description of the placement."""
    layers = sizes.layers
    weights = "weights on the GPU"
    if placed.streamed:
        weights = f"weights of {placed.streamed} of {layers} layers streamed from host memory"
    elif placed.dense:
        weights += f", those of {placed.dense} of {layers} layers in 16 bit"
    recomputed = "nothing is recomputed"
    if placement.recomputes(sizes, placed):
        recomputed = (
            f"{layers - placed.kept_mlp} of {layers} MLPs and {layers - placed.kept_attention} "
            "attention blocks are recomputed"
        )
        if placed.offload:
            recomputed += ", from inputs in host memory"
        if placed.tile:
            recomputed += f", MLPs {placed.tile} tokens at a time"
    return f"{weights}; {recomputed}"


def measured_rates(device: torch.device) -> Rates:
    """Operations/s and bytes/s of this machine; takes a fraction of a second."""
    host = pinned(PROBE_BYTES, "a measurement of the bus")
    there = torch.empty_like(host, device=device)
    square = torch.ones(PROBE_SIZE, PROBE_SIZE, dtype=torch.bfloat16, device=device)

    def seconds(run) -> float:
        run()
        torch.cuda.synchronize()
        started = time.monotonic()
        for _ in range(PROBE_RUNS):
            run()
        torch.cuda.synchronize()
        return (time.monotonic() - started) / PROBE_RUNS

    bus = PROBE_BYTES / seconds(lambda: there.copy_(host, non_blocking=True))
    operations = 2 * PROBE_SIZE**3 / seconds(lambda: square @ square)
    return Rates(operations, bus)


def faster(
    config: PretrainedConfig,
    shape: Shape,
    params: Params,
    rows: Lengths,
    ranks: int,
    budget: float,
    host: float,
    rates: Rates,
) -> str | None:
    """Another split of the same effective batch that would be faster on these cards.

    params  of one rank; the answer is for the whole step
    """
    train, found = params.train, {}
    effective = train.batch_size * train.gradient_accumulation
    for size in (n for n in range(1, effective + 1) if effective % n == 0):
        times = effective // size
        changed = train.model_copy(update={"batch_size": size, "gradient_accumulation": times})
        other = params.model_copy(update={"train": changed})
        sizes = run_sizes(config, shape, other, rows, ranks)
        kept = KEPT[train.gradient_checkpointing]
        if placed := placement.choose(sizes, budget, host, rates, kept):
            found[size] = times * placement.seconds(sizes, placed, rates)
    if train.batch_size not in found:
        return None
    best = min(found, key=lambda size: (found[size], -size))
    gain = found[train.batch_size] / found[best] - 1
    if gain < 2 * placement.ALIKE:
        return None
    return (
        f"batch_size {best} with gradient_accumulation {effective * ranks // best} would be about "
        f"{100 * gain:.0f} % faster on this card"
    )


def ring_bytes(sizes: Sizes, placed: Placement) -> float:
    """Bytes of host memory without a copy of streamed weights."""
    copied = placement.copied(sizes, placed)
    buffers = RING * sizes.layer_weights if placed.streamed else 0.0
    return placement.predict(sizes, placed).host - copied + buffers


def no_host_memory(needed: float) -> StageError:
    """The card suffices, but host memory does not."""
    return StageError(
        f"training on this card needs {needed / GB:.1f} GB of host memory, but only "
        f"{available_bytes() / GB:.1f} GB are free; close other programs or lower train.batch_size"
    )


def load_placed(
    folder: Path, device: torch.device, attention: str, placed: Placed, world: World = ALONE
) -> tuple[PreTrainedModel, Streamer | None]:
    """The base in `folder`, placed, and its streamer."""
    count = placed.placement.streamed
    if not count:
        return load_base(folder, device, attention), None
    kind = "ring" if placed.ring else "copy"
    return load_streamed(folder, device, count, kind, attention, world=world)


def tighter() -> float:
    """The share of the card to leave free after an earlier attempt ran out of memory."""
    return float(os.environ.get(TIGHTER, "0"))


def try_tighter() -> None:
    """After a GPU ran out of memory: restart the stage once, with less on the card.

    In the same process, so that DVC and its locks do not notice, and from the last checkpoint.
    Returns if that has already been tried.
    """
    if TIGHTER in os.environ:
        return
    print("train: out of GPU memory; retrying with less on the card", flush=True)
    os.environ[TIGHTER] = str(TIGHTER_SHARE)
    os.execv(sys.executable, [sys.executable, "-m", "stages.train"])
