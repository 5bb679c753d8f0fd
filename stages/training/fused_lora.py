"""LoRA products in fewer operations and less memory, for training without LoRA dropout.

For y = x W^T + s (x A^T) B^T, with a frozen W (4-bit or 16-bit) and trained A [r, in], B [out, r]:

- the adapter's product is added to the base's within the matrix product (addmm), while PEFT needs
  three passes over [tokens, out];
- layers with the same input x (q, k, v; gate, up) share one product with their stacked A;
- only x and the narrow x A^T are saved for the backward pass;
- a whole SwiGLU MLP is one operation;
- NF4 weights of some layers are dequantized once instead of before each product, if the card has
  room (`keep_dense`);
- gradient checkpointing keeps the inputs of attention and of the MLP, on the GPU or on the host, so
  that recomputation skips the output and down projections, whose results nothing needs.

The gradients equal those of PEFT's own layers up to rounding (tests/test_fast_path.py).
"""

from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Params4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper

from stages.shared.decoder_shape import layer_of
from stages.shared.fast_path import MLP_PARTS, is_swiglu, plain_layers
from stages.shared.placement import Placement
from stages.shared.streaming import Streamer
from stages.training.offload import HostStash, Slot

ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")
FIRST, SECOND = "first", "second"
_pass = None


@contextmanager
def _within(which: str):
    """Marks a checkpointed part as running for the first time or again for its backward pass."""
    global _pass
    _pass = which
    try:
        yield
    finally:
        _pass = None


class _Products:
    """LoRA linear layers with the same input: their frozen weights, adapters and products."""

    def __init__(
        self,
        layers: list[LoraLayer],
        dequantize,
        ends_part: bool = False,
        streamer: Streamer | None = None,
    ):
        self.bases: list[Any] = [layer.get_base_layer() for layer in layers]
        # Called before a weight is read, if its layer is streamed.
        self.enter = streamer.entrance(self.bases[0].weight) if streamer else None
        self.dequantize = dequantize
        self.a: list[torch.Tensor] = [m.lora_A.get_parameter("default.weight") for m in layers]
        self.b: list[torch.Tensor] = [m.lora_B.get_parameter("default.weight") for m in layers]
        self.scales = [layer.scaling["default"] for layer in layers]
        self.ranks = [len(a) for a in self.a]
        # Whether the result is the last one of a checkpointed part.
        self.ends_part = ends_part

    @property
    def adapters(self) -> list[torch.Tensor]:
        return [*self.a, *self.b]

    def weight(self, i: int, dtype: torch.dtype) -> torch.Tensor:
        if self.enter:
            self.enter()
        weight = self.bases[i].weight
        if isinstance(weight, Params4bit):
            weight = self.dequantize(weight.data, weight.quant_state)
        return weight.to(dtype)

    def stacked_a(self, dtype: torch.dtype) -> torch.Tensor:
        """[sum of ranks, in]"""
        return self.a[0].to(dtype) if len(self.a) == 1 else torch.cat(self.a).to(dtype)

    def scaled_b(self, i: int, dtype: torch.dtype) -> torch.Tensor:
        """s B [out, r], rounded once."""
        b = self.b[i]
        return torch.mul(b, self.scales[i], out=torch.empty_like(b, dtype=dtype))

    def forward(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Each y [tokens, out] of x [tokens, in], and x A^T [tokens, sum of ranks]."""
        dtype = x.dtype
        inner = x @ self.stacked_a(dtype).t()
        outputs = []
        for i, part in enumerate(inner.split(self.ranks, dim=1)):
            base = self.bases[i]
            if _pass == SECOND and self.ends_part:
                outputs.append(_unread(x, (len(x), base.out_features)))
                continue
            b = self.scaled_b(i, dtype).t()
            y = part @ b if base.bias is None else torch.addmm(base.bias.to(dtype), part, b)
            outputs.append(y.addmm_(x, self.weight(i, dtype).t()))
        return outputs, inner

    def backward(self, dys: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """dx [tokens, in], and s dy B [tokens, sum of ranks], from each dy [tokens, out]."""
        dtype = dys[0].dtype
        between = dys[0].new_empty(len(dys[0]), sum(self.ranks))
        for i, (dy, part) in enumerate(zip(dys, between.split(self.ranks, dim=1), strict=True)):
            torch.mm(dy, self.scaled_b(i, dtype), out=part)
        dx = between @ self.stacked_a(dtype)
        for i, dy in enumerate(dys):
            dx.addmm_(dy, self.weight(i, dtype))
        return dx, between

    def gradients(
        self, dys: list[torch.Tensor], between: torch.Tensor, x: torch.Tensor, inner: torch.Tensor
    ) -> list[torch.Tensor]:
        """Gradients of `adapters`, from arguments and results of `forward` and `backward`."""
        da = (between.t() @ x).to(self.a[0].dtype).split(self.ranks)
        db = [
            (dy.t() @ part).to(b.dtype).mul_(scale)
            for dy, part, b, scale in zip(
                dys, inner.split(self.ranks, dim=1), self.b, self.scales, strict=True
            )
        ]
        return [*da, *db]


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x [tokens, in] in autocast's type, since LayerNorm returns float32."""
    rows, device = x.reshape(-1, x.shape[-1]), x.device.type
    return rows.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else rows


def _unread(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A placeholder for a result that is not read, without memory."""
    return like.new_empty(()).expand(shape)


class _Linears(torch.autograd.Function):
    # The adapters are arguments so that autograd sees them.
    @staticmethod
    def forward(ctx, x, products, *adapters):
        flat = _rows(x)
        outputs, inner = products.forward(flat)
        ctx.products = products
        ctx.save_for_backward(flat, inner)
        # No views for autograd: some families add to them in place.
        view = torch.ops.aten._unsafe_view
        return tuple(view(y, [*x.shape[:-1], y.shape[-1]]) for y in outputs)

    @staticmethod
    def backward(ctx, *dys):
        x, inner = ctx.saved_tensors
        flat = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
        dx, between = ctx.products.backward(flat)
        adapters = ctx.products.gradients(flat, between, x, inner)
        return dx.view(*dys[0].shape[:-1], -1), None, *adapters


class _Mlp(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)), each with its adapter (arXiv 2002.05202, SwiGLU)."""

    @staticmethod
    def forward(ctx, x, gate_up, down, swiglu, *adapters):
        ctx.gate_up, ctx.down, ctx.swiglu = gate_up, down, swiglu
        flat = _rows(x)
        (g, u), inner = gate_up.forward(flat)
        if _pass != FIRST:
            ctx.save_for_backward(flat, inner, g, u)
        if _pass == SECOND and down.ends_part:
            return _unread(flat, x.shape)
        h = swiglu.forward(g, u)
        del g, u
        (y,), _ = down.forward(h)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        x, inner, g, u = ctx.saved_tensors
        gate_up, down = ctx.gate_up, ctx.down
        dys = [dy.reshape(-1, dy.shape[-1])]
        dh, between = down.backward(dys)
        h, *dg_du = ctx.swiglu.backward(g, u, dh)
        del g, u, dh
        h_inner = h @ down.stacked_a(h.dtype).t()
        of_down = down.gradients(dys, between, h, h_inner)
        del h
        dx, between = gate_up.backward(dg_du)
        of_gate_up = gate_up.gradients(dg_du, between, x, inner)
        return dx.view(dy.shape), None, None, None, *of_gate_up, *of_down


class TorchSwiglu:
    """silu(g) * u; `backward` recomputes it and returns the gradients of g and u too."""

    @staticmethod
    def forward(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(g) * u

    @staticmethod
    def backward(g, u, dh):
        sigmoid = torch.sigmoid(g)
        silu = g * sigmoid
        dg = dh * u * (sigmoid + silu * (1 - sigmoid))
        return silu * u, dg, dh * silu


class _Residual(torch.autograd.Function):
    """hidden + branch(hidden), which saves only `hidden` and recomputes the branch.

    tile  tokens to compute at once, for a branch that is independent by token; 0 for all
    """

    @staticmethod
    def forward(ctx, hidden, branch, slot, tile):
        ctx.branch, ctx.slot, ctx.tile = branch, slot, tile
        ctx.device = hidden.device.type
        ctx.autocast = torch.is_autocast_enabled(ctx.device), torch.get_autocast_dtype(ctx.device)
        if slot is None:
            ctx.save_for_backward(hidden)
        else:
            slot.put(hidden)
        with _within(FIRST):
            if not tile:
                return branch(hidden).add_(hidden)
            result = torch.empty_like(hidden)
            for part, out in zip(_tiles(hidden, tile), _tiles(result, tile), strict=True):
                torch.add(branch(part), part, out=out)
            return result

    @staticmethod
    def backward(ctx, dy):
        kept = ctx.saved_tensors[0] if ctx.slot is None else ctx.slot.take()
        if not ctx.tile:
            return _Residual.again(ctx, kept, dy).add_(dy), None, None, None
        result = dy.clone()
        parts = (_tiles(x, ctx.tile) for x in (kept, dy, result))
        for part, gradient, out in zip(*parts, strict=True):
            out.add_(_Residual.again(ctx, part, gradient))
        return result, None, None, None

    @staticmethod
    def again(ctx, kept, dy):
        """The gradient of the branch's input; those of its parameters are accumulated."""
        hidden = kept.detach().requires_grad_()
        enabled, dtype = ctx.autocast
        with torch.enable_grad(), torch.autocast(ctx.device, dtype, enabled), _within(SECOND):
            branch = ctx.branch(hidden)
        branch.backward(dy)
        return hidden.grad


def _tiles(x: torch.Tensor, tokens: int) -> tuple[torch.Tensor, ...]:
    """Views of x [batch, tokens, hidden], as [1, at most `tokens`, hidden]."""
    return x.view(1, -1, x.shape[-1]).split(tokens, dim=1)


def fuse_lora(
    model: PeftModel,
    liger: bool,
    placement: Placement,
    stash: HostStash | None = None,
    streamer: Streamer | None = None,
) -> int:
    """Let the LoRA layers of `model` compute by the products above; returns their number.

    For training only: the adapter cannot be disabled afterwards. Decoder layers of a supported type
    recompute what `placement` does not keep, in halves, from inputs in `stash` if given; others
    checkpoint by their own method. `streamer` is asked for streamed weights.
    """
    dequantize, swiglu = _kernels(liger)
    modules: list[Any] = list(model.modules())
    layers = list(_lora_layers(model).values())
    plain: list[Any] = plain_layers(model)
    ends = {end for m in plain for end in (m.self_attn.o_proj, m.mlp.down_proj)}
    groups = [[getattr(m.self_attn, name) for name in ATTENTION_INPUTS] for m in plain]
    groups = [[m for m in group if isinstance(m, LoraLayer)] for group in groups]
    grouped = {m for group in groups for m in group}
    groups += [[m] for m in layers if m not in grouped]
    for group in filter(None, groups):
        _read_together(group, _Products(group, dequantize, group[0] in ends, streamer))
    for mlp in filter(_is_swiglu_mlp, modules):
        gate, up, down = (getattr(mlp, f"{part}_proj") for part in MLP_PARTS)
        gate_up = _Products([gate, up], dequantize, streamer=streamer)
        down = _Products([down], dequantize, down in ends, streamer)
        mlp.forward = MethodType(_mlp_forward(gate_up, down, swiglu), mlp)
    count = len(plain)
    if plain and min(placement.kept_mlp, placement.kept_attention) < count:
        for i, layer in enumerate(plain):
            kept = i >= count - placement.kept_attention, i >= count - placement.kept_mlp
            slots = [None if keeps or not stash else stash.slot() for keeps in kept]
            layer.forward = MethodType(_in_halves(kept, slots, placement.tile), layer)
        model.enable_input_require_grads()
    elif not plain and not placement.kept_mlp:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return len(layers)


def keep_dense(model: PeftModel, liger: bool, count: int) -> int:
    """Replace the NF4 weights that the products of the first `count` layers read by the 16-bit ones
    that they dequantize to. Returns the additional bytes, without those of NF4's constants.

    After `fuse_lora`: PEFT's own layers could not read them. The packed bytes are freed one weight
    at a time; nothing else reads the base, of which no stage saves the weights in memory.
    """
    dequantize, _ = _kernels(liger)
    added = 0
    for name, layer in _lora_layers(model).items():
        base: Any = layer.get_base_layer()
        packed, number = base.weight, layer_of(name)
        if isinstance(packed, Params4bit) and number is not None and number < count:
            dense = dequantize(packed.data, packed.quant_state)
            added += dense.nbytes - packed.nbytes
            base.weight = torch.nn.Parameter(dense, requires_grad=False)
            # bitsandbytes keeps the constants here too.
            base.quant_state = None
    return added


def _kernels(liger: bool) -> tuple[Callable[..., torch.Tensor], type]:
    """What dequantizes, and what computes SwiGLU."""
    if not liger:
        return dequantize_4bit, TorchSwiglu
    from stages.training.kernels import LigerSwiglu, dequantize

    return dequantize, LigerSwiglu


def _lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """The LoRA layers by full name, without those around experts, which only hold factors
    (stages/shared/expert_lora.py)."""
    named: dict[str, Any] = dict(model.named_modules())
    return {
        name: module
        for name, module in named.items()
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper)
    }


def _in_halves(kept: tuple[bool, bool], slots: list[Slot | None], tile: int):
    """The forward pass of a decoder layer in two halves; a half that is not `kept` saves only its
    input."""

    def forward(layer, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        def attend(hidden):
            return layer.self_attn(layer.input_layernorm(hidden), **kwargs)[0]

        def transform(hidden):
            return layer.mlp(layer.post_attention_layernorm(hidden))

        for half, keeps, slot, at_once in zip(
            (attend, transform), kept, slots, (0, tile), strict=True
        ):
            if keeps or not layer.training:
                hidden_states = hidden_states + half(hidden_states)
            else:
                hidden_states = _Residual.apply(hidden_states, half, slot, at_once)
        return hidden_states

    return forward


def _is_swiglu_mlp(module: torch.nn.Module) -> bool:
    parts = [getattr(module, f"{name}_proj", None) for name in MLP_PARTS]
    return all(isinstance(part, LoraLayer) for part in parts) and is_swiglu(module)


def _read_together(layers: list[LoraLayer], products: _Products) -> None:
    """Let the first of `layers` compute for all; the others, called next, return their results."""
    computed: deque[torch.Tensor] = deque()

    def first(self, x, *args, **kwargs):
        # A failed pass may have left results.
        computed.clear()
        computed.extend(_Linears.apply(x, products, *products.adapters))
        return computed.popleft()

    def other(self, x, *args, **kwargs):
        return computed.popleft()

    for layer in layers:
        compute = first if layer is layers[0] else other
        layer.forward = MethodType(compute, layer)  # type: ignore[attr-defined]  # a Module too


def _mlp_forward(gate_up: _Products, down: _Products, swiglu):
    adapters = [*gate_up.adapters, *down.adapters]

    def forward(self, x):
        return _Mlp.apply(x, gate_up, down, swiglu, *adapters)

    return forward
