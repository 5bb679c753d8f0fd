"""Passes all batches through one layer, then all through the next, so that each is loaded once.

With streamed weights, a pass over them takes as long as computing several batches. The model's own
forward runs twice for each batch, with stand-ins for its layers: the first run records the
arguments of each layer beside the hidden state (masks, position embeddings), the second computes
the result from the last layer's hidden state. In between each layer computes as usual, on the same
batches; only the order differs, so every value is the same.

The hidden states are kept on the device if they fit, else in host memory, at most CHUNK_BYTES; more
batches need further passes. They go to host memory and back on a stream of their own, while other
batches are computed. The CPU waits for none of these copies, so that it can launch ahead.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from stages.shared.host_memory import HostBuffers
from stages.shared.layer_sources import layer_bytes, places_in
from stages.shared.streaming import Streamer, decoder_layers

CHUNK_BYTES = 4e9
Inputs = dict[str, Any]
# A hidden state on its way to host memory, and the end of that copy.
_Leaving = tuple[torch.Tensor, torch.cuda.Event]
_HIDDEN = object()


class NotByLayer(Exception):
    """A layer needs more from earlier layers than their hidden state."""


class _Noted(Exception):
    """Ends the first forward, once all layers' arguments are recorded."""


@torch.no_grad()
def last_hidden_states(
    causal: PreTrainedModel, batches: list[Inputs], streamer: Streamer | None
) -> Iterator[torch.Tensor]:
    """The last hidden state [rows, width, H] of each batch of arguments of the model's forward.

    Layer by layer if weights are streamed. Families that do not support this are reported, and
    stream the weights for each batch.
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
                f"{causal.config.model_type}: {reason}; streaming all weights for each of "
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
    tokens = [inputs["input_ids"].numel() for inputs in batches]
    chunk, leaving = list[_Batch](), list[_Leaving]()
    total = len(layers) * sum(tokens)
    bar = tqdm(total=total, unit=" tokens", desc="layers", leave=False, disable=None)
    try:
        while rest:
            size = next_size = held = 0.0
            copies, moving = None, 0.0
            while rest and size + next_size <= CHUNK_BYTES:
                batch = _Batch(causal, layers, rest.pop(0), leaving)
                ahead = tokens[-len(rest) - 1 :]
                each = batch.size / batch.tokens
                if not chunk and each * sum(ahead) > streamer.room:
                    # Two more hidden states are on the device, one on its way out and one in.
                    moving = 2 * max(ahead) * batch.hidden.nbytes / batch.tokens
                    copies = streamer.copies if moving <= streamer.room else None
                    moving = moving if copies else 0.0
                chunk.append(batch)
                if batch.size > streamer.room - held - moving:
                    # The first that leaves asks for the buffers of all that the chunk may have.
                    ends = accumulate(each * n for n in ahead)
                    count = sum(end <= CHUNK_BYTES - size for end in ends)
                    asked = any(one.home for one in chunk)
                    batch.leave(streamer.buffers, copies, [] if asked else ahead[:count])
                else:
                    held += batch.size
                _let_go(leaving, 1)
                # Sorted, the longest first.
                size, next_size = size + batch.size, batch.size
                bar.update(batch.tokens)
            for i in range(1, len(layers)):
                for batch, following in zip(chunk, chunk[1:] + chunk[:1], strict=True):
                    following.fetch()
                    batch.compute(layers[i], i)
                    _let_go(leaving, 1)
                    bar.update(batch.tokens)
            _let_go(leaving, 0)
            while chunk:
                for batch in chunk[:2]:
                    batch.fetch()
                yield chunk.pop(0).result(causal, layers)
    finally:
        bar.close()
        streamer.buffers.cancel()
        if streamer.copies:
            # If the pass was abandoned, copies still read or write what is freed now.
            torch.cuda.synchronize(causal.device)


class _Batch:
    """A batch between two layers, on the device until `leave`.

    leaving  hidden states on their way to host memory, to which it appends its own
    """

    def __init__(
        self,
        causal: PreTrainedModel,
        layers: torch.nn.ModuleList,
        inputs: Inputs,
        leaving: list[_Leaving],
    ):
        self.inputs, self.tokens = inputs, inputs["input_ids"].numel()
        self.leaving = leaving
        # (arguments, named arguments) of each layer, with _HIDDEN for the hidden state.
        self.calls: list[tuple[tuple, dict]] = []
        # The hidden state in host memory, if kept there; other return values, if a tuple.
        self.host: torch.Tensor | None = None
        # Its buffer, and where that is returned to.
        self.home: tuple[HostBuffers, torch.Tensor] | None = None
        self.rest: tuple | None = None
        # The hidden state on its way to the device, and the end of that copy.
        self.copies: torch.cuda.Stream | None = None
        self.coming: tuple[torch.Tensor, torch.cuda.Event] | None = None
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
                # The value does not matter.
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
        self.size = sum(x.nbytes for x in self._tensors())

    def leave(
        self, buffers: HostBuffers, copies: torch.cuda.Stream | None, ahead: list[int]
    ) -> None:
        """Wait in host memory between layers.

        copies  a stream for the hidden state's copies, if the device has room for two more
        ahead   tokens of batches that will probably leave too, whose buffers are asked for
        """
        tensors = self._tensors()
        size = layer_bytes(tensors, None)
        buffers.ask([size * tokens // self.tokens for tokens in ahead])
        buffer = buffers.take(size)
        self.home, self.copies = (buffers, buffer), copies
        self.host, *others = places_in(buffer, tensors, None)
        moved = {id(x): (x, place) for x, place in zip(tensors[1:], others, strict=True)}
        for tensor, place in moved.values():
            place.copy_(tensor, non_blocking=True)
        host = torch.device("cpu")
        self.calls = [
            (tuple(_changed(x, _to(host), moved) for x in args), _on(host, kwargs, moved))
            for args, kwargs in self.calls
        ]
        self._take(self._output(self.hidden))

    def fetch(self) -> None:
        """Begin to copy the hidden state to the device, while others compute."""
        if self.copies and self.host is not None and self.coming is None:
            # Memory of the computing stream, which may still be using it.
            hidden = self.hidden.new_empty(self.host.shape)
            self.copies.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.copies):
                hidden.copy_(self.host, non_blocking=True)
            self.coming = hidden, self.copies.record_event()

    def compute(self, layer: torch.nn.Module, i: int) -> None:
        """Go through `layer`, number i."""
        hidden = self._hidden()
        args, kwargs = self.calls[i]
        given = [hidden if x is _HIDDEN else _changed(x, _to(hidden.device)) for x in args]
        named = {k: hidden if x is _HIDDEN else x for k, x in kwargs.items()}
        self._take(layer(*given, **_on(hidden.device, named)))

    def result(self, causal: PreTrainedModel, layers: torch.nn.ModuleList) -> torch.Tensor:
        """The model's last hidden state, computed from the last layer's output."""
        hidden = self._hidden()
        if self.home:
            # Copies into it follow the computing stream, which waits for the one out of it.
            buffers, buffer = self.home
            buffers.put(buffer)
            self.host = self.home = None
        output = self._output(hidden)
        unknown = _changed(output, _unknown)

        def pass_on(number: int, _args: tuple, _kwargs: dict) -> Any:
            return output if number == len(layers) - 1 else unknown

        with _stand_ins(layers, pass_on):
            found = causal.base_model(**_on(causal.device, self.inputs)).last_hidden_state
        if found.isnan().any() and not hidden.isnan().any():
            raise NotByLayer("its result depends on several layers")
        return found

    def _take(self, output: Any) -> None:
        """Store what a layer returned."""
        hidden, self.rest = (output[0], output[1:]) if type(output) is tuple else (output, None)
        if not isinstance(hidden, torch.Tensor):
            raise NotByLayer(f"its layers return {type(hidden).__name__}")
        if self.host is None:
            self.hidden = hidden
            return
        if self.copies:
            self.copies.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.copies):
                self.host.copy_(hidden, non_blocking=True)
            # Held until then, since the memory belongs to the computing stream.
            self.leaving.append((hidden, self.copies.record_event()))
        else:
            self.host.copy_(hidden, non_blocking=True)
        # Not a view, which would keep the whole hidden state on the device.
        self.hidden = hidden.new_empty(0)

    def _hidden(self) -> torch.Tensor:
        """The hidden state on the computing device."""
        if self.host is None:
            return self.hidden
        if not self.copies:
            return self.host.to(self.hidden.device, non_blocking=True)
        self.fetch()
        assert self.coming
        (hidden, copied), self.coming = self.coming, None
        wait_for(copied)
        return hidden

    def _tensors(self) -> list[torch.Tensor]:
        """The hidden state, and what else the layers are given."""
        others = [x for args, kwargs in self.calls for x in (*args, *kwargs.values())]
        return _tensors([self.hidden, *others])

    def _output(self, hidden: torch.Tensor) -> Any:
        """The stored output in a layer's form."""
        return hidden if self.rest is None else (hidden, *self.rest)


def _let_go(leaving: list[_Leaving], still: int) -> None:
    """Free all but the last `still` once they have arrived."""
    while len(leaving) > still:
        torch.cuda.current_stream().wait_event(leaving[0][1])
        del leaving[0]


def wait_for(event: torch.cuda.Event) -> None:
    """Let the computing stream wait for a hidden state's arrival."""
    torch.cuda.current_stream().wait_event(event)


class _StandIn(torch.nn.Module):
    """Stands in for a layer, with all its attributes; calls `answer`(number, args, kwargs)."""

    def __init__(self, number: int, layer: torch.nn.Module, answer: Callable):
        super().__init__()
        # Not as submodules.
        self.__dict__.update(number=number, layer=layer, answer=answer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, *args, **kwargs) -> Any:
        return self.answer(self.number, args, kwargs)


@contextmanager
def _stand_ins(layers: torch.nn.ModuleList, answer: Callable) -> Iterator[None]:
    """Replace the layers within the block."""
    own = list(layers)
    try:
        for number, layer in enumerate(own):
            layers[number] = _StandIn(number, layer, answer)
        yield
    finally:
        for number, layer in enumerate(own):
            layers[number] = layer


def _changed(value: Any, change: Callable, known: dict | None = None) -> Any:
    """`value` with its tensors changed, each once; tuples, lists and dicts are traversed."""
    known = {} if known is None else known
    if isinstance(value, torch.Tensor):
        if id(value) not in known:
            # Keeps the tensor alive, since otherwise another one could get its id.
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
    # To the device alone. From memory that is not locked, the copy begins at once.
    return lambda tensor: tensor.to(device, non_blocking=True)


def _on(device: torch.device, named: dict, known: dict | None = None) -> dict:
    return {key: _changed(value, _to(device), known) for key, value in named.items()}


def _unknown(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else tensor
