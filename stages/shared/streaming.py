"""Streams weights from host memory or files to the device that computes with them.

The layers take turns in a few buffers of one layer each. When a layer starts, the next two in the
direction of the pass (up in the forward, down in the backward pass) are already there or being
copied on a separate stream. A parameter's `data` always points to the same place in the same
buffer, so that references that autograd saved in the forward pass are valid in the backward pass
once the layer has been requested again. On the CPU, which computes in float32, 16-bit weights are
converted in the buffer.

Results do not change: the same values are multiplied by the same kernels, from equally aligned
memory.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import PreTrainedModel

from stages.shared.host_memory import HostBuffers
from stages.shared.layer_sources import (
    HostCopy,
    Layer,
    Make,
    Mapped,
    Ring,
    Source,
    layer_bytes,
    places_in,
    type_on_device,
)
from stages.shared.placement import SLOTS
from stages.shared.text_model import kept_in_float32

# Smaller parameters (norms, biases) stay on the GPU.
SMALLEST = 65536
# Number of layers to time in order to estimate all.
PROBED = 4


class Streamer:
    """Streams `layers`, in the order of the forward pass, to `device`.

    source  the layers in host memory
    dtype   type to convert to, except 4-bit weights; None to keep the type
    slots   maximum number of buffers on the device

    Four attributes are for scoring (stages/shared/by_layer.py): `room`, bytes of the device for
    hidden states, `by_layer`, whether all batches can pass through one layer before the next, and
    `buffers` in host memory with a stream for copies from and to them, on a GPU.
    """

    def __init__(
        self,
        layers: list[Layer],
        device: torch.device,
        source: Source,
        dtype: torch.dtype | None = None,
        slots: int = SLOTS,
    ):
        self.source, self.layers = source, layers
        self.room, self.by_layer = 0.0, True
        on_gpu = device.type == "cuda"
        self.buffers = HostBuffers(on_gpu)
        self.copies = torch.cuda.Stream(device) if on_gpu else None
        self.count = len(layers)
        sizes = [layer_bytes(layer, dtype) for layer in layers]
        self.bytes, size = sum(sizes), max(sizes)
        slots = min(slots, self.count)
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(slots)]
        self.held: list[int | None] = [None] * slots
        self.arrived: list[torch.cuda.Event | None] = [None] * slots
        self.stream = torch.cuda.Stream(device) if on_gpu else None
        self.current: int | None = None
        # Number of layers sent so far.
        self.sent = 0
        self._layers = {id(p): i for i, layer in enumerate(layers) for p in layer}
        # Of each layer: where what the source returns is copied to.
        self._targets: list[list[torch.Tensor]] = []
        for i, layer in enumerate(layers):
            slot = self.slots[i % slots]
            places = places_in(slot, layer, dtype)
            self._targets.append([slot[: sizes[i]]] if source.whole else places)
            for place, parameter in zip(places, layer, strict=True):
                parameter.data = place

    def enter(self, i: int) -> None:
        """Prepare layer i for use on the current stream."""
        if i == self.current:
            return
        # The previous layer means a backward pass; any other jump starts a new forward pass.
        step = -1 if self.current is not None and i == self.current - 1 else 1
        self.current = i
        for near in (i, i + step, i + 2 * step):
            # With few slots, the current layer must stay.
            stays = near != i and (near - i) % len(self.slots) == 0
            if 0 <= near < self.count and not stays and self.held[near % len(self.slots)] != near:
                self._send(near)
        for far in (i + 3 * step, i + 4 * step):
            self.source.ask(far)
        arrived = self.arrived[i % len(self.slots)]
        if arrived is not None:
            torch.cuda.current_stream().wait_event(arrived)

    def entrance(self, parameter: torch.nn.Parameter) -> Callable[[], None] | None:
        """A function to call before each use of `parameter`, if it is streamed."""
        layer = self._layers.get(id(parameter))
        return None if layer is None else partial(self.enter, layer)

    def attach(self, model: torch.nn.Module) -> None:
        """Let every module of `model` with a streamed parameter request its layer before its
        forward and its backward pass."""
        for module in model.modules():
            owned = {self._layers[id(p)] for p in module.parameters(False) if id(p) in self._layers}
            for i in owned:
                module.register_forward_pre_hook(lambda *_, i=i: self.enter(i))
                module.register_full_backward_pre_hook(lambda *_, i=i: self.enter(i))

    def pass_seconds(self) -> float:
        """Estimated seconds to stream every layer once, measured on the first ones."""
        few, started = min(self.count, PROBED), time.monotonic()
        for i in range(few):
            self._send(i)
        if self.stream is not None:
            torch.cuda.synchronize()
        self.current = None
        return (time.monotonic() - started) * self.count / few

    def _send(self, i: int) -> None:
        slot = i % len(self.slots)
        self.held[slot] = i
        self.sent += 1
        pairs = zip(self._targets[i], self.source.take(i), strict=True)
        if self.stream is None:
            for target, tensor in pairs:
                target.copy_(tensor)
            self.source.sent(i, None)
            return
        # Computation with the slot's previous layer must have finished.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for target, tensor in pairs:
                target.copy_(tensor, non_blocking=True)
            self.arrived[slot] = self.stream.record_event()
        self.source.sent(i, self.arrived[slot])


def decoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The decoder's layers, in order. Raises ValueError if the model has none."""
    count = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {count} layers")


def spread(count: int, layers: int) -> list[int]:
    """`count` of `layers` layers, spread out so that copies overlap with resident layers."""
    return [(2 * i + 1) * layers // (2 * count) for i in range(count)]


def stream_layers(
    model: PreTrainedModel,
    device: torch.device,
    count: int,
    kind: str = "copy",
    path: str | None = None,
    dtype: torch.dtype | None = None,
    slots: int = SLOTS,
    make: Make | None = None,
) -> Streamer:
    """Move `model` from host memory to `device`, with `count` layers streamed.

    kind   `copy` makes a locked copy; `ring`, the fallback if locking is refused, reads the mapped
           files through locked buffers each time; `files` reads them directly
    path   of another process's HostCopy of the same layers; None to make one
    dtype  type to convert to, except 4-bit weights; None to keep the type
    make   (name, stored tensor) -> the tensor to compute with; for `files`
    """
    names = {id(p): name for name, p in model.named_parameters()}
    layers: Sequence[torch.nn.Module]
    try:
        layers = list(decoder_layers(model))
    except ValueError:
        # A single layer, which is copied once and then stays in its buffer.
        layers = [model.base_model]
    count = min(count, len(layers))
    float32 = kept_in_float32(model)
    kept = {id(parameter) for name, parameter in model.named_parameters() if name in float32}
    chosen = [
        [p for p in streamed_weights(layers[i]) if id(p) not in kept]
        for i in spread(count, len(layers))
    ]
    streamed = {id(p) for layer in chosen for p in layer}
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.weight.quant_state.to(device)  # type: ignore[attr-defined]  # a Params4bit
        for key, buffer in module.named_buffers(recurse=False):
            setattr(module, key, buffer.to(device))
    for parameter in model.parameters():
        if id(parameter) not in streamed:
            stored = parameter.data
            value = make(names[id(parameter)], stored) if make else stored
            own = torch.float32 if id(parameter) in kept else type_on_device(parameter, dtype)
            parameter.data = value.to(device, own)
    source: Source
    try:
        if kind == "files":
            source = Mapped(chosen, names, make)
        else:
            source = Ring(chosen, dtype) if kind == "ring" else HostCopy(chosen, dtype, path)
    except MemoryError:
        source = Ring(chosen, dtype)
    streamer = Streamer(chosen, device, source, dtype, slots)
    streamer.attach(model)
    for number, i in enumerate(spread(count, len(layers))):
        # Some layers read a module's weight without calling the module.
        layers[i].register_forward_pre_hook(lambda *_, number=number: streamer.enter(number))
    return streamer


def streamed_weights(layer: torch.nn.Module) -> Layer:
    """The parameters of a layer that are worth streaming."""
    return [p for p in layer.parameters() if isinstance(p, Params4bit) or p.nbytes >= SMALLEST]
