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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import PreTrainedModel

from stages.shared.host_memory import LOCKING_THREADS, lock, pinned, shared_buffer
from stages.shared.placement import SLOTS
from stages.shared.text_model import kept_in_float32

# Smaller parameters (norms, biases) stay on the GPU.
SMALLEST = 65536
# Alignment of parameters within a layer; layers are aligned to pages.
ALIGNMENT, PAGE = 256, 4096
# Buffers of a ring, which threads fill ahead of use, and number of threads, each about 2 GB/s.
RING, RING_THREADS = 5, 8
# Number of layers to time in order to estimate all.
PROBED = 4

Layer = list[torch.nn.Parameter]
Make = Callable[[str, torch.Tensor], torch.Tensor]


class HostCopy:
    """All layers in page-locked memory.

    path  of another process's copy, to be mapped; None to make one, for which the attribute `path`
          is set.

    Raises MemoryError if the driver refuses to lock it.
    """

    def __init__(self, layers: list[Layer], dtype: torch.dtype | None, path: str | None = None):
        sizes = [_rounded(_layer_bytes(layer, dtype), PAGE) for layer in layers]
        flat, self.path = shared_buffer(sum(sizes), path)
        self.layers = list(flat.split(sizes))
        pairs = zip(self.layers, layers, strict=True)
        self.places = [_places(buffer, layer, dtype) for buffer, layer in pairs]

        def fill(number: int) -> str | None:
            if path is None:
                for place, parameter in zip(self.places[number], layers[number], strict=True):
                    place.copy_(parameter.data)
            return lock(self.layers[number])

        with ThreadPoolExecutor(LOCKING_THREADS) as pool:
            refusals = list(pool.map(fill, range(len(layers))))
        if any(refusals):
            raise MemoryError(next(filter(None, refusals)))

    @property
    def host_bytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def ask(self, i: int) -> None:
        """Announce that layer i is needed soon."""

    def take(self, i: int) -> list[torch.Tensor]:
        """The tensors of layer i in locked memory, valid until `sent`."""
        return self.places[i]

    def sent(self, i: int, arrived: torch.cuda.Event | None) -> None:
        """Layer i has been copied once the event `arrived` has happened."""


class Ring:
    """Layers in mapped files, which threads copy into a few locked buffers ahead of use.

    Used if host memory has no room for a copy, or does not allow locking it.
    """

    path = None

    def __init__(self, layers: list[Layer], dtype: torch.dtype | None):
        size, self.dtype = max(_layer_bytes(layer, dtype) for layer in layers), dtype
        # The parameters' data will point to the GPU.
        self.layers = [[parameter.data for parameter in layer] for layer in layers]
        on_gpu = torch.cuda.is_available()
        self.buffers = [
            pinned(size, "a ring of layers") if on_gpu else torch.empty(size, dtype=torch.uint8)
            for _ in range(RING)
        ]
        self.leaving: list[torch.cuda.Event | None] = [None] * RING
        # Layer -> its buffer, its tensors there, and the futures that fill them.
        self.filling: dict[int, tuple[int, list[torch.Tensor], list[Future]]] = {}
        self.threads = ThreadPoolExecutor(RING_THREADS)

    @property
    def host_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def ask(self, i: int) -> None:
        used = {buffer for buffer, *_ in self.filling.values()}
        free = [buffer for buffer in range(RING) if buffer not in used]
        if free and i not in self.filling and 0 <= i < len(self.layers):
            self._fill(i, free[0])

    def take(self, i: int) -> list[torch.Tensor]:
        if i not in self.filling and len(self.filling) == RING:
            # The pass turned around: the oldest request is no longer needed.
            *_, futures = self.filling.pop(next(iter(self.filling)))
            for future in futures:
                future.result()
        self.ask(i)
        _, places, futures = self.filling[i]
        for future in futures:
            future.result()
        return places

    def sent(self, i: int, arrived: torch.cuda.Event | None) -> None:
        self.leaving[self.filling.pop(i)[0]] = arrived

    def _fill(self, i: int, buffer: int) -> None:
        left, self.leaving[buffer] = self.leaving[buffer], None
        parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        places = _places(self.buffers[buffer], self.layers[i], self.dtype)
        for place, data in zip(places, self.layers[i], strict=True):
            share = -(-data.numel() // RING_THREADS)
            flat = data.reshape(-1).split(share)
            parts += zip(place.view(-1).split(share), flat, strict=True)

        def fill(place: torch.Tensor, data: torch.Tensor) -> None:
            if left is not None:
                left.synchronize()
            place.copy_(data)

        self.filling[i] = buffer, places, [self.threads.submit(fill, *part) for part in parts]


class Mapped:
    """Layers in memory-mapped files, read when needed; for the CPU, and for weights that `make`
    (name, stored tensor) computes from the stored ones."""

    path, host_bytes = None, 0

    def __init__(self, layers: list[Layer], names: dict[int, str], make: Make | None = None):
        self.layers = [[(names[id(p)], p.data) for p in layer] for layer in layers]
        self.make = make or (lambda _name, stored: stored)

    def ask(self, i: int) -> None:
        pass

    def take(self, i: int) -> Iterable[torch.Tensor]:
        return (self.make(name, stored) for name, stored in self.layers[i])

    def sent(self, i: int, arrived: torch.cuda.Event | None) -> None:
        pass


Source = HostCopy | Ring | Mapped


class Streamer:
    """Streams `layers`, in the order of the forward pass, to `device`.

    source  the layers in host memory
    dtype   type to convert to, except 4-bit weights; None to keep the type
    slots   maximum number of buffers on the device

    Three attributes are for scoring (stages/shared/by_layer.py): `room`, bytes of the device for
    hidden states, `by_layer`, whether all batches can pass through one layer before the next, and
    `buffers`, unused ones in host memory.
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
        self.buffers: list[torch.Tensor] = []
        self.count = len(layers)
        sizes = [_layer_bytes(layer, dtype) for layer in layers]
        self.bytes, size = sum(sizes), max(sizes)
        slots = min(slots, self.count)
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(slots)]
        self.held: list[int | None] = [None] * slots
        self.arrived: list[torch.cuda.Event | None] = [None] * slots
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.current: int | None = None
        # Number of layers sent so far.
        self.sent = 0
        self._layers = {id(p): i for i, layer in enumerate(layers) for p in layer}
        for i, layer in enumerate(layers):
            places = _places(self.slots[i % slots], layer, dtype)
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
        pairs = zip(self.layers[i], self.source.take(i), strict=True)
        if self.stream is None:
            for parameter, tensor in pairs:
                parameter.data.copy_(tensor)
            self.source.sent(i, None)
            return
        # Computation with the slot's previous layer must have finished.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for parameter, tensor in pairs:
                parameter.data.copy_(tensor, non_blocking=True)
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
        # One that takes its turn with nothing: all that it costs is the room.
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
            own = torch.float32 if id(parameter) in kept else _dtype(parameter, dtype)
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


def _dtype(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The type of a parameter on the device."""
    packed = isinstance(tensor, Params4bit) or not tensor.is_floating_point()
    return tensor.dtype if packed or dtype is None else dtype


def _places(buffer: torch.Tensor, layer: list, dtype: torch.dtype | None) -> list[torch.Tensor]:
    """The place of each tensor of `layer` in `buffer`."""
    places, start = [], 0
    for tensor in layer:
        own = _dtype(tensor, dtype)
        end = start + tensor.numel() * own.itemsize
        places.append(buffer[start:end].view(own).view(tensor.shape))
        start = _rounded(end, ALIGNMENT)
    return places


def _layer_bytes(layer: list, dtype: torch.dtype | None) -> int:
    return sum(_rounded(t.numel() * _dtype(t, dtype).itemsize, ALIGNMENT) for t in layer)


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
