"""LoRA products in fewer operations and less memory, for training without LoRA dropout.

For y = x W^T + s (x A^T) B^T, with a frozen W (4-bit or 16-bit) and trained A [r, in], B [out, r]:

- the adapter's part is added by the matrix product itself (addmm), where PEFT writes it out,
  scales it and adds it in three passes over [tokens, out];
- x is all that is kept for the backward pass (s x A^T is cheap to make again);
- a whole SwiGLU MLP is one operation;
- gradient checkpointing keeps the inputs of attention and of the MLP, so that a layer's second
  pass computes neither the output nor the down projection: nothing differentiates through them.

The gradients are those of PEFT's own layers up to roundings (tests/test_fast_path.py).
"""

from contextlib import contextmanager, nullcontext
from functools import partial
from types import MethodType

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Params4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch.utils.checkpoint import checkpoint

MLP_PARTS = ("gate", "up", "down")
# Layers that are residual attention, then a residual MLP, each after its norm, and nothing more.
PLAIN_LAYERS = {f"{name}DecoderLayer" for name in ("Llama", "Mistral", "Qwen2", "Qwen3")}
_recomputing = False


@contextmanager
def _second_pass():
    global _recomputing
    _recomputing = True
    try:
        yield
    finally:
        _recomputing = False


def _contexts():
    """The `context_fn` of torch.utils.checkpoint: tells the products that they run again."""
    return nullcontext(), _second_pass()


# Without dropout there is no random state to keep.
_checkpoint = partial(
    checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts
)


class _Product:
    """One LoRA linear layer: its frozen weight and adapter, and the products with them."""

    def __init__(self, layer: LoraLayer):
        self.base = layer.get_base_layer()
        self.a = layer.lora_A["default"].weight
        self.b = layer.lora_B["default"].weight
        self.scale = layer.scaling["default"]
        # Whether its result is the last thing that a checkpointed part computes.
        self.ends_part = False

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        weight = self.base.weight
        if isinstance(weight, Params4bit):
            weight = dequantize_4bit(weight.data, weight.quant_state)
        return weight.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [tokens, out] of x [tokens, in]."""
        dtype = x.dtype
        weight = self.weight(dtype)
        if self.base.bias is None:
            y = x @ weight.t()
        else:
            y = torch.addmm(self.base.bias.to(dtype), x, weight.t())
        return y.addmm_(x @ self.a.to(dtype).t(), self.b.to(dtype).t(), alpha=self.scale)

    def backward(self, dy: torch.Tensor, x: torch.Tensor, into: torch.Tensor | None = None):
        """(dx [tokens, in], dA, dB); dx is added to `into` when given."""
        dtype = dy.dtype
        a, b = self.a.to(dtype), self.b.to(dtype)
        down = dy @ b
        weight = self.weight(dtype)
        dx = dy @ weight if into is None else into.addmm_(dy, weight)
        dx.addmm_(down, a, alpha=self.scale)
        da = (down.t() @ x).to(self.a.dtype).mul_(self.scale)
        db = (dy.t() @ (x @ a.t())).to(self.b.dtype).mul_(self.scale)
        return dx, da, db


class _Linear(torch.autograd.Function):
    # A and B are arguments so that autograd sees them; the product holds them too.
    @staticmethod
    def forward(ctx, x, a, b, product):
        ctx.product = product
        flat = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(flat)
        if _recomputing and product.ends_part:
            return x.new_empty(*x.shape[:-1], product.base.out_features)
        return product.forward(flat).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dx, da, db = ctx.product.backward(dy.reshape(-1, dy.shape[-1]), x)
        return dx.view(*dy.shape[:-1], -1), da, db, None


class _Mlp(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)), each with its adapter (arXiv 2002.05202, SwiGLU)."""

    @staticmethod
    def forward(ctx, x, gate, up, down, swiglu, *adapters):
        ctx.products, ctx.swiglu = (gate, up, down), swiglu
        flat = x.reshape(-1, x.shape[-1])
        g, u = gate.forward(flat), up.forward(flat)
        ctx.save_for_backward(flat, g, u)
        if _recomputing and down.ends_part:
            return torch.empty_like(x)
        return down.forward(swiglu.forward(g, u)).view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        x, g, u = ctx.saved_tensors
        gate, up, down = ctx.products
        dh, *d_down = down.backward(dy.reshape(-1, dy.shape[-1]), ctx.swiglu.forward(g, u))
        dg, du = ctx.swiglu.backward(g, u, dh)
        dx, *d_gate = gate.backward(dg, x)
        dx, *d_up = up.backward(du, x, into=dx)
        return dx.view(dy.shape), None, None, None, None, *d_gate, *d_up, *d_down


class TorchSwiglu:
    """silu(g) * u and its gradients in torch."""

    @staticmethod
    def forward(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(g) * u

    @staticmethod
    def backward(g, u, dh):
        sigmoid = torch.sigmoid(g)
        silu = g * sigmoid
        return dh * u * (sigmoid + silu * (1 - sigmoid)), dh * silu


class LigerSwiglu:
    """The same by Liger's kernels, one pass each; the gradients overwrite g and u."""

    @staticmethod
    def forward(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        from liger_kernel.ops.swiglu import swiglu_forward

        return swiglu_forward(g, u)[2]

    @staticmethod
    def backward(g, u, dh):
        from liger_kernel.ops.swiglu import swiglu_backward

        return swiglu_backward(g, u, dh)


def fuse_lora(model: PeftModel, liger: bool, checkpointing: bool) -> int:
    """Let every LoRA layer of `model` compute by the products above; returns how many do.

    For training only: the adapter cannot be switched off afterwards. With `checkpointing`, layers
    of a known form checkpoint their two parts; others by their own method.
    """
    swiglu = LigerSwiglu if liger else TorchSwiglu
    modules = list(model.modules())
    products = {m: _Product(m) for m in modules if isinstance(m, LoraLayer)}
    for layer, product in products.items():
        layer.forward = MethodType(_linear_forward(product), layer)
    for module in modules:
        if _is_swiglu_mlp(module):
            parts = [products[module.get_submodule(f"{part}_proj")] for part in MLP_PARTS]
            module.forward = MethodType(_mlp_forward(parts, swiglu), module)
    if checkpointing:
        plain = [m for m in modules if type(m).__name__ in PLAIN_LAYERS]
        for layer in plain:
            layer.forward = MethodType(_two_parts, layer)
            ends = (layer.self_attn.o_proj, layer.mlp.down_proj)
            for end in ends:
                if end in products:
                    products[end].ends_part = True
        if not plain:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return len(products)


def _two_parts(layer, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
    """The forward pass of a decoder layer, which keeps only the inputs of its two parts."""

    def attend(hidden):
        return hidden + layer.self_attn(layer.input_layernorm(hidden), **kwargs)[0]

    def transform(hidden):
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    if not layer.training:
        return transform(attend(hidden_states))
    return _checkpoint(transform, _checkpoint(attend, hidden_states))


def _is_swiglu_mlp(module: torch.nn.Module) -> bool:
    children = dict(module.named_children())
    parts = [children.get(f"{name}_proj") for name in MLP_PARTS]
    activation = type(children.get("act_fn")).__name__
    return all(isinstance(part, LoraLayer) for part in parts) and activation.startswith("SiLU")


def _linear_forward(product: _Product):
    def forward(self, x, *args, **kwargs):
        return _Linear.apply(x, product.a, product.b, product)

    return forward


def _mlp_forward(products: list[_Product], swiglu):
    adapters = [weight for product in products for weight in (product.a, product.b)]

    def forward(self, x):
        return _Mlp.apply(x, *products, swiglu, *adapters)

    return forward
