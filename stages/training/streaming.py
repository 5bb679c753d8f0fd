"""Weights that wait in host memory and visit the GPU while they are computed with.

The layers take turns in SLOTS buffers of one layer each. When a layer begins, the next two in the
direction of the pass are on their way, on a stream of their own, or there already: up in the
forward pass, down in the backward pass. A parameter's `data` always points at its layer's place in
the same buffer, so that what autograd noted in the forward pass is right in the backward pass too,
once its layer has been asked for again.

What is computed does not change: the same bytes are multiplied by the same kernels.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from bitsandbytes.nn import Linear4bit, Params4bit

from stages.shared.placement import SLOTS
from stages.training.host_memory import LOCKING_THREADS, lock, pinned, shared_buffer

# Smaller parameters (norms, biases) stay on the GPU.
SMALLEST = 65536
# Parameters begin at multiples of it within a layer, and layers at multiples of a page.
ALIGNMENT, PAGE = 256, 4096
# Of a ring: buffers that threads fill ahead of use, and threads. Each thread reads about 2 GB/s.
RING, RING_THREADS = 5, 8

Layer = list[torch.nn.Parameter]


class HostCopy:
    """All layers in page-locked memory.

    path  of another process's copy, which is mapped and not filled; None to make one. The
          attribute `path` is for such processes.

    Raises MemoryError when the driver refuses to lock it.
    """

    def __init__(self, layers: list[Layer], path: str | None = None):
        sizes = [_rounded(_layer_bytes(layer), PAGE) for layer in layers]
        flat, self.path = shared_buffer(sum(sizes), path)
        self.layers = list(flat.split(sizes))

        def fill(buffer: torch.Tensor, layer: Layer) -> str | None:
            if path is None:
                for place, parameter in _places(buffer, layer):
                    place.copy_(parameter.data)
            return lock(buffer)

        with ThreadPoolExecutor(LOCKING_THREADS) as pool:
            refusals = list(pool.map(fill, self.layers, layers))
        if any(refusals):
            raise MemoryError(next(filter(None, refusals)))

    @property
    def host_bytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def ask(self, i: int) -> None:
        """Layer i is needed soon."""

    def take(self, i: int) -> torch.Tensor:
        """Layer i in locked memory, uint8, to be copied from until `sent`."""
        return self.layers[i]

    def sent(self, i: int, arrived: torch.cuda.Event | None) -> None:
        """Layer i has left once `arrived` has happened."""


class Ring:
    """Layers in mapped files, which threads copy into a few locked buffers ahead of use.

    For where the host has no room for a copy, or does not let it be locked.
    """

    path = None

    def __init__(self, layers: list[Layer]):
        size = max(_layer_bytes(layer) for layer in layers)
        # The parameters' data will point at the GPU.
        self.layers = [[parameter.data for parameter in layer] for layer in layers]
        on_gpu = torch.cuda.is_available()
        self.buffers = [
            pinned(size, "a ring of layers") if on_gpu else torch.empty(size, dtype=torch.uint8)
            for _ in range(RING)
        ]
        self.leaving: list[torch.cuda.Event | None] = [None] * RING
        self.filling: dict[int, tuple[int, list[Future]]] = {}
        self.threads = ThreadPoolExecutor(RING_THREADS)

    @property
    def host_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def ask(self, i: int) -> None:
        used = {buffer for buffer, _ in self.filling.values()}
        free = [buffer for buffer in range(RING) if buffer not in used]
        if free and i not in self.filling and 0 <= i < len(self.layers):
            self._fill(i, free[0])

    def take(self, i: int) -> torch.Tensor:
        if i not in self.filling and len(self.filling) == RING:
            # The pass turned around: what was asked for first is not needed.
            _, futures = self.filling.pop(next(iter(self.filling)))
            for future in futures:
                future.result()
        self.ask(i)
        buffer, futures = self.filling[i]
        for future in futures:
            future.result()
        return self.buffers[buffer]

    def sent(self, i: int, arrived: torch.cuda.Event | None) -> None:
        self.leaving[self.filling.pop(i)[0]] = arrived

    def _fill(self, i: int, buffer: int) -> None:
        left, self.leaving[buffer] = self.leaving[buffer], None
        parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        for place, data in _places(self.buffers[buffer], self.layers[i]):
            share = -(-data.numel() // RING_THREADS)
            flat = data.reshape(-1).split(share)
            parts += zip(place.view(-1).split(share), flat, strict=True)

        def fill(place: torch.Tensor, data: torch.Tensor) -> None:
            if left is not None:
                left.synchronize()
            place.copy_(data)

        self.filling[i] = buffer, [self.threads.submit(fill, *part) for part in parts]


class Streamer:
    """Lets `layers`, in the order of the forward pass, take turns on `device`.

    source  their bytes in host memory
    """

    def __init__(self, layers: list[Layer], device: torch.device, source: HostCopy | Ring):
        self.source = source
        self.count = len(layers)
        size = max(_layer_bytes(layer) for layer in layers)
        slots = min(SLOTS, self.count)
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(slots)]
        self.held: list[int | None] = [None] * slots
        self.arrived: list[torch.cuda.Event | None] = [None] * slots
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.current: int | None = None
        # Layers sent so far.
        self.sent = 0
        self._layers = {id(p): i for i, layer in enumerate(layers) for p in layer}
        for i, layer in enumerate(layers):
            for place, parameter in _places(self.slots[i % slots], layer):
                parameter.data = place

    def enter(self, i: int) -> None:
        """Layer i is computed with next, on the current stream."""
        if i == self.current:
            return
        step = -1 if self.current is not None and i < self.current else 1
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

    def _send(self, i: int) -> None:
        slot = i % len(self.slots)
        self.held[slot] = i
        self.sent += 1
        buffer = self.source.take(i)
        place = self.slots[slot]
        size = min(len(buffer), len(place))
        if self.stream is None:
            place[:size].copy_(buffer[:size])
            self.source.sent(i, None)
            return
        # What was computed with the slot's last layer must be over.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            place[:size].copy_(buffer[:size], non_blocking=True)
            self.arrived[slot] = self.stream.record_event()
        self.source.sent(i, self.arrived[slot])


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The decoder's layers, in order. Raises ValueError for a model that has none."""
    count = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return list(module)
    raise ValueError(f"{type(model).__name__} has no list of {count} layers")


def spread(count: int, layers: int) -> list[int]:
    """`count` of `layers` layers, as far apart as they can be: resident ones compute meanwhile."""
    return [(2 * i + 1) * layers // (2 * count) for i in range(count)]


def stream_layers(
    model: torch.nn.Module,
    device: torch.device,
    count: int,
    path: str | None = None,
    ring: bool = False,
) -> Streamer:
    """Put `model`, which lies in host memory, on `device`, with `count` layers streamed.

    path  of another process's HostCopy of the same layers, None to make one
    ring  make no copy: read the mapped files each time, as where locking a copy is refused
    """
    layers = decoder_layers(model)
    chosen = [streamed_weights(layers[i]) for i in spread(count, len(layers))]
    streamed = {id(p) for layer in chosen for p in layer}
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.weight.quant_state.to(device)  # type: ignore[attr-defined]  # a Params4bit
        for key, buffer in module.named_buffers(recurse=False):
            setattr(module, key, buffer.to(device))
    for parameter in model.parameters():
        if id(parameter) not in streamed:
            parameter.data = parameter.data.to(device)
    source: HostCopy | Ring
    try:
        source = Ring(chosen) if ring else HostCopy(chosen, path)
    except MemoryError:
        source = Ring(chosen)
    streamer = Streamer(chosen, device, source)
    streamer.attach(model)
    return streamer


def streamed_weights(layer: torch.nn.Module) -> Layer:
    """The parameters of a layer that are worth streaming."""
    return [p for p in layer.parameters() if isinstance(p, Params4bit) or p.nbytes >= SMALLEST]


def _places(buffer: torch.Tensor, tensors: list) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(the place of each tensor in `buffer`, of its dtype and shape; the tensor)."""
    start = 0
    for tensor in tensors:
        end = start + tensor.nbytes
        yield buffer[start:end].view(tensor.dtype).view(tensor.shape), tensor
        start = _rounded(end, ALIGNMENT)


def _layer_bytes(layer: list) -> int:
    return sum(_rounded(tensor.nbytes, ALIGNMENT) for tensor in layer)


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
