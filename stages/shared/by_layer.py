"""All batches through one layer, then all through the next, so that each layer is needed once.

Where weights are streamed, a pass over them takes as long as several batches compute. The model's
own forward runs twice for each batch, with stand-ins for its layers: the first run notes what each
layer is given beside the hidden state (masks, embeddings of positions), the second makes the result
of the last layer's hidden state. Between the two each layer computes what it always does, of the
same batch: only the order differs, and every value is the same.

The hidden states wait on the device where they have room, else in host memory, CHUNK_BYTES of them
at most: more batches than that take further passes.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from stages.shared.host_memory import lock
from stages.shared.streaming import Streamer, decoder_layers

CHUNK_BYTES = 4e9
Inputs = dict[str, Any]
_HIDDEN = object()


class NotByLayer(Exception):
    """A layer takes more from the layers before it than their hidden state."""


class _Noted(Exception):
    """Every layer's arguments are known; what would follow is not needed yet."""


@torch.no_grad()
def last_hidden_states(
    causal: PreTrainedModel, batches: list[Inputs], streamer: Streamer | None
) -> Iterator[torch.Tensor]:
    """The last hidden state [rows, width, H] of each batch of arguments of the model's forward.

    Layer by layer where weights are streamed; families in which that cannot be are named, and
    stream them for each batch.
    """
    done = 0
    if streamer and streamer.by_layer:
        try:
            for hidden in _by_layer(causal, batches, streamer):
                done += 1
                yield hidden
        except NotByLayer as reason:
            streamer.by_layer = False
            print(
                f"{causal.config.model_type}: {reason}; all weights are streamed again for each of "
                f"{len(batches)} batches",
                flush=True,
            )
    for inputs in batches[done:]:
        yield causal.base_model(**_on(causal.device, inputs)).last_hidden_state


def _by_layer(
    causal: PreTrainedModel, batches: list[Inputs], streamer: Streamer
) -> Iterator[torch.Tensor]:
    try:
        layers, rest = decoder_layers(causal), list(batches)
    except ValueError as reason:
        raise NotByLayer(str(reason)) from None
    tokens = sum(inputs["input_ids"].numel() for inputs in batches)
    with tqdm(
        total=len(layers) * tokens, unit=" tokens", desc="layers", leave=False, disable=None
    ) as bar:
        while rest:
            chunk: list[_Batch] = []
            size = next_size = 0.0
            while rest and size + next_size <= CHUNK_BYTES:
                batch = _Batch(causal, layers, rest.pop(0), streamer.room - size)
                chunk.append(batch)
                # They come longest first.
                size, next_size = size + batch.size, batch.size
                bar.update(batch.tokens)
            for i in range(1, len(layers)):
                for batch in chunk:
                    batch.compute(layers[i], i)
                    bar.update(batch.tokens)
            while chunk:
                yield chunk.pop(0).result(causal, layers)


class _Batch:
    """A batch between two layers, at first behind the first.

    room  bytes of the device that it may keep while others compute
    """

    def __init__(
        self, causal: PreTrainedModel, layers: torch.nn.ModuleList, inputs: Inputs, room: float
    ):
        self.inputs, self.tokens = inputs, inputs["input_ids"].numel()
        # (arguments, named arguments) of each layer, with _HIDDEN for the hidden state.
        self.calls: list[tuple[tuple, dict]] = []
        # In host memory, where it waits there; and what a layer returns besides, if a tuple.
        self.host: torch.Tensor | None = None
        self.rest: tuple | None = None
        first, known = layers[0], set[int]()
        passed: Any = None

        def note(number: int, args: tuple, kwargs: dict) -> Any:
            nonlocal passed
            hidden = args[0] if args else kwargs["hidden_states"]
            others = [x for x in (*args, *kwargs.values()) if x is not hidden]
            new = {id(x): x for x in _tensors(others) if id(x) not in known}
            known.update(new)
            if not number:
                self._take(first(*args, **kwargs))
                # What is made of it shows.
                passed = _changed(self._output(self.hidden), _unknown)
            elif hidden is not (passed if self.rest is None else passed[0]) or any(
                bool(x.isnan().any()) for x in new.values()
            ):
                raise NotByLayer("its layers pass on more than a hidden state")
            named = {k: _HIDDEN if x is hidden else x for k, x in kwargs.items()}
            self.calls.append((tuple(_HIDDEN if x is hidden else x for x in args), named))
            if number == len(layers) - 1:
                raise _Noted
            return passed

        try:
            with _stand_ins(layers, note):
                causal.base_model(**_on(causal.device, inputs))
        except _Noted:
            pass
        if len(self.calls) < len(layers):
            raise NotByLayer(f"its forward runs {len(self.calls)} of {len(layers)} layers")
        others = [x for args, kwargs in self.calls for x in (*args, *kwargs.values())]
        self.size = sum(x.nbytes for x in _tensors([self.hidden, *others]))
        if self.size > room:
            host, copies = torch.device("cpu"), dict[int, Any]()
            self.calls = [
                (tuple(_changed(x, _to(host), copies) for x in args), _on(host, kwargs, copies))
                for args, kwargs in self.calls
            ]
            self.host = torch.empty_like(self.hidden, device=host)
            if causal.device.type == "cuda":
                # Where that is refused, copies take longer.
                lock(self.host)
            self._take(self._output(self.hidden))

    def compute(self, layer: torch.nn.Module, i: int) -> None:
        """Go through `layer`, number i."""
        hidden = self._hidden()
        args, kwargs = self.calls[i]
        given = [hidden if x is _HIDDEN else _changed(x, _to(hidden.device)) for x in args]
        named = {k: hidden if x is _HIDDEN else x for k, x in kwargs.items()}
        self._take(layer(*given, **_on(hidden.device, named)))

    def result(self, causal: PreTrainedModel, layers: torch.nn.ModuleList) -> torch.Tensor:
        """The model's last hidden state, made of the last layer's output."""
        hidden = self._hidden()
        output = self._output(hidden)
        unknown = _changed(output, _unknown)

        def pass_on(number: int, _args: tuple, _kwargs: dict) -> Any:
            return output if number == len(layers) - 1 else unknown

        with _stand_ins(layers, pass_on):
            found = causal.base_model(**_on(causal.device, self.inputs)).last_hidden_state
        if found.isnan().any() and not hidden.isnan().any():
            raise NotByLayer("its result is made of several layers")
        return found

    def _take(self, output: Any) -> None:
        """Wait with what a layer returned."""
        hidden, self.rest = (output[0], output[1:]) if type(output) is tuple else (output, None)
        if not isinstance(hidden, torch.Tensor):
            raise NotByLayer(f"its layers return {type(hidden).__name__}")
        if self.host is None:
            self.hidden = hidden
            return
        # On the stream that computes, as all copies here: none comes too early.
        self.host.copy_(hidden, non_blocking=True)
        self.hidden = hidden[:0]

    def _hidden(self) -> torch.Tensor:
        """The hidden state on the device that computes."""
        if self.host is None:
            return self.hidden
        return self.host.to(self.hidden.device, non_blocking=True)

    def _output(self, hidden: torch.Tensor) -> Any:
        """As a layer returns it."""
        return hidden if self.rest is None else (hidden, *self.rest)


class _StandIn(torch.nn.Module):
    """In the place of a layer, of which it has every attribute: `answer`(number, args, kwargs)."""

    def __init__(self, number: int, layer: torch.nn.Module, answer: Callable):
        super().__init__()
        # Not as modules: nothing of it is this one's.
        self.__dict__.update(number=number, layer=layer, answer=answer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, *args, **kwargs) -> Any:
        return self.answer(self.number, args, kwargs)


@contextmanager
def _stand_ins(layers: torch.nn.ModuleList, answer: Callable) -> Iterator[None]:
    """For the time of a forward of the model."""
    own = list(layers)
    try:
        for number, layer in enumerate(own):
            layers[number] = _StandIn(number, layer, answer)
        yield
    finally:
        for number, layer in enumerate(own):
            layers[number] = layer


def _changed(value: Any, change: Callable, known: dict | None = None) -> Any:
    """`value` with its tensors changed, each once; they lie in tuples and lists at most."""
    known = {} if known is None else known
    if isinstance(value, torch.Tensor):
        if id(value) not in known:
            # With the tensor itself, or another one could get its id.
            known[id(value)] = value, change(value)
        return known[id(value)][1]
    if type(value) in (tuple, list):
        return type(value)(_changed(part, change, known) for part in value)
    return value


def _tensors(values: Iterable) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    _changed(list(values), found.append)
    return found


def _to(device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.to(device)


def _on(device: torch.device, named: dict, known: dict | None = None) -> dict:
    return {key: _changed(value, _to(device), known) for key, value in named.items()}


def _unknown(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else tensor
