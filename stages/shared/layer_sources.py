"""Where streamed layers wait: locked host memory, or files, mapped or read ahead into a ring."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from bitsandbytes.nn import Params4bit

from stages.shared.host_memory import LOCKING_THREADS, lock, pinned, shared_buffer

# Alignment of parameters within a layer; layers are aligned to pages.
ALIGNMENT, PAGE = 256, 4096
# Buffers of a ring, which threads fill ahead of use, and number of threads, each about 2 GB/s.
RING, RING_THREADS = 5, 8

Layer = list[torch.nn.Parameter]
Make = Callable[[str, torch.Tensor], torch.Tensor]


class HostCopy:
    """All layers in page-locked memory.

    path  of another process's copy, to be mapped; None to make one, for which the attribute `path`
          is set.

    Raises MemoryError if the driver refuses to lock it.
    """

    def __init__(self, layers: list[Layer], dtype: torch.dtype | None, path: str | None = None):
        sizes = [_rounded(layer_bytes(layer, dtype), PAGE) for layer in layers]
        flat, self.path = shared_buffer(sum(sizes), path)
        self.layers = list(flat.split(sizes))
        pairs = zip(self.layers, layers, strict=True)
        self.places = [places_in(buffer, layer, dtype) for buffer, layer in pairs]

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
        size, self.dtype = max(layer_bytes(layer, dtype) for layer in layers), dtype
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
        places = places_in(self.buffers[buffer], self.layers[i], self.dtype)
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


def type_on_device(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The type of a parameter on the device."""
    packed = isinstance(tensor, Params4bit) or not tensor.is_floating_point()
    return tensor.dtype if packed or dtype is None else dtype


def places_in(buffer: torch.Tensor, layer: list, dtype: torch.dtype | None) -> list[torch.Tensor]:
    """The place of each tensor of `layer` in `buffer`."""
    places, start = [], 0
    for tensor in layer:
        own = type_on_device(tensor, dtype)
        end = start + tensor.numel() * own.itemsize
        places.append(buffer[start:end].view(own).view(tensor.shape))
        start = _rounded(end, ALIGNMENT)
    return places


def layer_bytes(layer: list, dtype: torch.dtype | None) -> int:
    return sum(_rounded(t.numel() * type_on_device(t, dtype).itemsize, ALIGNMENT) for t in layer)


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
