"""Weights that wait in host memory or in their files, and visit what computes with them.

The layers take turns in a few buffers of one layer each. When a layer begins, the next two in the
direction of the pass are on their way, on a stream of their own, or there already: up in the
forward pass, down in the backward pass. A parameter's `data` always points at its layer's place in
the same buffer, so that what autograd noted in the forward pass is right in the backward pass too,
once its layer has been asked for again. On the CPU, which computes in float32, 16-bit weights
become that in their buffer.

What is computed does not change: the same values are multiplied by the same kernels, from memory
that is aligned the same way wherever a file has them.
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
# Parameters begin at multiples of it within a layer, and layers at multiples of a page.
ALIGNMENT, PAGE = 256, 4096
# Of a ring: buffers that threads fill ahead of use, and threads. Each thread reads about 2 GB/s.
RING, RING_THREADS = 5, 8
# Layers by which the time of all is told.
PROBED = 4

Layer = list[torch.nn.Parameter]
Make = Callable[[str, torch.Tensor], torch.Tensor]


class HostCopy:
    """All layers in page-locked memory.

    path  of another process's copy, which is mapped and not filled; None to make one. The
          attribute `path` is for such processes.

    Raises MemoryError when the driver refuses to lock it.
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
        """Layer i is needed soon."""

    def take(self, i: int) -> list[torch.Tensor]:
        """The tensors of layer i in locked memory, to be copied from until `sent`."""
        return self.places[i]

    def sent(self, i: int, arrived: torch.cuda.Event | None) -> None:
        """Layer i has left once `arrived` has happened."""


class Ring:
    """Layers in mapped files, which threads copy into a few locked buffers ahead of use.

    For where the host has no room for a copy, or does not let it be locked.
    """

    path = None

    def __init__(self, layers: list[Layer], dtype: torch.dtype | None):
        size, self.dtype = max(_layer_bytes(layer, dtype) for layer in layers), dtype
        # The parameters' data will point at the GPU.
        self.layers = [[parameter.data for parameter in layer] for layer in layers]
        on_gpu = torch.cuda.is_available()
        self.buffers = [
            pinned(size, "a ring of layers") if on_gpu else torch.empty(size, dtype=torch.uint8)
            for _ in range(RING)
        ]
        self.leaving: list[torch.cuda.Event | None] = [None] * RING
        # By layer: its buffer, its places there and what fills them.
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
            # The pass turned around: what was asked for first is not needed.
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
    """Layers in mapped files, read when they are needed; for the CPU, and for weights that `make`
    (name, stored tensor) gives for the stored ones."""

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
    """Lets `layers`, in the order of the forward pass, take turns on `device`.

    source  them in host memory
    dtype   what they become, those in 4 bit apart; None for what they are
    slots   buffers on the device, at most

    Two attributes are of those who score (stages/shared/by_layer.py): `room`, bytes of the device
    that hidden states may wait in, and `by_layer`, whether all batches can go through one layer
    before the next.
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
        self.count = len(layers)
        sizes = [_layer_bytes(layer, dtype) for layer in layers]
        self.bytes, size = sum(sizes), max(sizes)
        slots = min(slots, self.count)
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(slots)]
        self.held: list[int | None] = [None] * slots
        self.arrived: list[torch.cuda.Event | None] = [None] * slots
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.current: int | None = None
        # Layers sent so far.
        self.sent = 0
        self._layers = {id(p): i for i, layer in enumerate(layers) for p in layer}
        for i, layer in enumerate(layers):
            places = _places(self.slots[i % slots], layer, dtype)
            for place, parameter in zip(places, layer, strict=True):
                parameter.data = place

    def enter(self, i: int) -> None:
        """Layer i is computed with next, on the current stream."""
        if i == self.current:
            return
        # A backward pass; from any other layer a forward pass begins anew.
        step = -1 if self.current is not None and i == self.current - 1 else 1
        self.current = i
        for near in (i, i + step, i + 2 * step):
            # With fewer slots than layers on their way, the layer at work stays.
            stays = near != i and (near - i) % len(self.slots) == 0
            if 0 <= near < self.count and not stays and self.held[near % len(self.slots)] != near:
                self._send(near)
        for far in (i + 3 * step, i + 4 * step):
            self.source.ask(far)
        arrived = self.arrived[i % len(self.slots)]
        if arrived is not None:
            torch.cuda.current_stream().wait_event(arrived)

    def entrance(self, parameter: torch.nn.Parameter) -> Callable[[], None] | None:
        """What to call before each use of `parameter`, if it is streamed."""
        layer = self._layers.get(id(parameter))
        return None if layer is None else partial(self.enter, layer)

    def attach(self, model: torch.nn.Module) -> None:
        """Let every module of `model` that owns a streamed parameter ask for its layer, before it
        computes and before autograd goes back through it."""
        for module in model.modules():
            owned = {self._layers[id(p)] for p in module.parameters(False) if id(p) in self._layers}
            for i in owned:
                module.register_forward_pre_hook(lambda *_, i=i: self.enter(i))
                module.register_full_backward_pre_hook(lambda *_, i=i: self.enter(i))

    def pass_seconds(self) -> float:
        """About how long it takes to stream every layer once, by the first of them."""
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
        # What was computed with the slot's last layer must be over.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for parameter, tensor in pairs:
                parameter.data.copy_(tensor, non_blocking=True)
            self.arrived[slot] = self.stream.record_event()
        self.source.sent(i, self.arrived[slot])


def decoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The decoder's layers, in order. Raises ValueError for a model that has none."""
    count = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {count} layers")


def spread(count: int, layers: int) -> list[int]:
    """`count` of `layers` layers, as far apart as they can be: resident ones compute meanwhile."""
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
    """Put `model`, which lies in host memory, on `device`, with `count` layers streamed.

    kind   `copy` makes a locked copy, `ring` reads the mapped files each time, as where locking a
           copy is refused, `files` too and without buffers between
    path   of another process's HostCopy of the same layers, None to make one
    dtype  what everything becomes that is not in 4 bit; None for what it is
    make   (name, stored tensor): the one to compute with; for `files`
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
        # Some layers read a module's weight and do not call the module.
        layers[i].register_forward_pre_hook(lambda *_, number=number: streamer.enter(number))
    return streamer


def streamed_weights(layer: torch.nn.Module) -> Layer:
    """The parameters of a layer that are worth streaming."""
    return [p for p in layer.parameters() if isinstance(p, Params4bit) or p.nbytes >= SMALLEST]


def _dtype(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """What a parameter becomes."""
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
