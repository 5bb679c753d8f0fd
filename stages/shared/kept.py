"""What autograd keeps of a decoder's layers for the backward pass, counted by running them.

stages/shared/activations.py has formulas for the families that Liger knows. Of others, the layers
run once on the meta device, for a few tokens, with frozen weights: what they keep then is all but
the inputs of adapters. Attention is replaced by one that keeps what FlashAttention keeps, and
autocast, which the meta device lacks, by its casts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from stages.shared.decoder_shape import ATTENTION

# A prime, so that a dimension is a multiple of it if it counts tokens, and hardly otherwise.
TOKENS = 97
COUNTED = "counted"
STREAM = "hidden_states"
# What CUDA's autocast computes in float32 and in bfloat16 (torch.amp, "CUDA Op-Specific Behavior").
# fmt: off
FLOAT32 = {
    "acos", "asin", "cosh", "cosine_similarity", "cumprod", "cumsum", "dist", "erfinv", "exp",
    "expm1", "group_norm", "layer_norm", "log", "log10", "log1p", "log2", "log_softmax", "norm",
    "pow", "__pow__", "prod", "reciprocal", "renorm", "rsqrt", "sinh", "softmax", "softmin",
    "softplus", "square", "sum", "tan",
}
BFLOAT16 = {"addmm", "baddbmm", "bmm", "einsum", "linear", "matmul", "__matmul__", "mm"}
# fmt: on


@dataclass(frozen=True)
class Kept:
    """Bytes of a token and layer that autograd keeps without adapters.

    attention  in the module of attention, and in norms anywhere
    between    in the rest: of a dense layer, what is between the MLP's products
    reads      of each Linear, what identifies its input: Linears of the same one share its copy;
               empty if it is kept anyway
    """

    attention: float
    between: float
    reads: dict[str, str]


class _Attention(torch.autograd.Function):
    """q [batch, tokens, heads, d] and k, v; the output has the layout of q, as FlashAttention's."""

    @staticmethod
    def forward(ctx, q, k, v):
        q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
        out = torch.empty_like(q) if q.shape[-1] == v.shape[-1] else q[..., : v.shape[-1]].clone()
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out


def _mask(*args, **kwargs) -> torch.Tensor:
    return torch.zeros(1, 1, TOKENS, TOKENS, dtype=torch.bfloat16, device="meta")


AttentionMaskInterface.register(COUNTED, _mask)


class _Autocast(TorchFunctionMode):
    """The casts of CUDA's autocast to bfloat16."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.__name__, kwargs or {}
        if name == "__bool__":
            # What models ask of values is whether all tokens are real.
            return True
        if name == "scaled_dot_product_attention":
            query, *others = args[:3]
            return _Attention.apply(query.transpose(1, 2), *others).transpose(1, 2)
        if name in FLOAT32 | BFLOAT16:
            dtype = torch.float32 if name in FLOAT32 else torch.bfloat16

            def cast(x: torch.Tensor) -> torch.Tensor:
                return x.to(dtype) if x.is_floating_point() else x

            args, kwargs = tree_map_only(torch.Tensor, cast, (args, kwargs))
        return function(*args, **kwargs)


class _Counter:
    """Notes what is kept while a layer runs, and where."""

    def __init__(self, names: dict[torch.nn.Module, str]):
        self.names = names
        self.attended = False
        self.inside: list[tuple[torch.nn.Module, str]] = []
        self.kept: dict[int, tuple[torch.UntypedStorage, str]] = {}
        self.passed: set[int] = set()
        # Storages that Linears read, held so that none takes the place of another.
        self.read: dict[str, torch.Tensor] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # Of no tokens are copies of weights, and of tokens by tokens the scores of attention, which
        # activations.py counts.
        of_tokens = sum(size % TOKENS == 0 for size in tensor.shape) == 1
        counts = of_tokens and tensor.numel() > TOKENS and storage._cdata not in self.passed
        if self.inside and counts:
            self.kept.setdefault(storage._cdata, (storage, self.inside[-1][1]))
        return tensor

    def attend(self, module, query, key, value, *args, **kwargs) -> tuple[torch.Tensor, None]:
        self.attended = True
        return _Attention.apply(query.transpose(1, 2), key, value), None

    def enter_layer(self, layer, args, kwargs):
        """Cosines and masks are shared by all layers; the residual stream has a gradient."""
        for x in tree_leaves((args[1:], {k: v for k, v in kwargs.items() if k != STREAM})):
            if isinstance(x, torch.Tensor):
                self.passed.add(x.untyped_storage()._cdata)
        self.inside.append((layer, "between"))
        stream = args[0] if args else kwargs[STREAM]
        stream = stream.detach().to(torch.bfloat16).requires_grad_()
        return ((stream, *args[1:]), kwargs) if args else (args, kwargs | {STREAM: stream})

    def enter(self, module, args):
        where = self.inside[-1][1]
        if "Norm" in type(module).__name__ or _has_attention(module):
            where = "attention"
        self.inside.append((module, where))

    def leave(self, *args):
        self.inside.pop()

    def enter_linear(self, module, args):
        self.read[self.names[module]] = args[0]

    def result(self, layers: int) -> Kept:
        reads: dict[str, str] = {}
        first: dict[int, str] = {}
        for name, x in self.read.items():
            key = x.untyped_storage()._cdata
            # Of float32, each Linear makes its own copy.
            own = name if x.dtype != torch.bfloat16 else first.setdefault(key, name)
            reads[name] = "" if key in self.kept and x.dtype == torch.bfloat16 else own
        sizes = {"attention": 0, "between": 0}
        for storage, where in self.kept.values():
            sizes[where] += storage.nbytes()
        attention, between = (size / TOKENS / layers for size in sizes.values())
        return Kept(attention, between, reads)


def _has_attention(module: torch.nn.Module) -> bool:
    children = module.named_children()
    return any(name in ATTENTION and isinstance(x, torch.nn.Linear) for name, x in children)


def count_kept(model: PreTrainedModel, layers: int) -> Kept | None:
    """What the `layers` of `model`, on the meta device, keep for a token: their mean.

    None if they cannot run without values.
    """
    stacks = [x for x in model.modules() if isinstance(x, torch.nn.ModuleList) and len(x) == layers]
    if not stacks:
        return None
    model.eval().requires_grad_(False)
    config = model.config.get_text_config()
    own = config._attn_implementation
    try:
        # Families that do not leave attention to transformers have it as they would train.
        for implementation in (COUNTED, own):
            config._attn_implementation = implementation
            counter = _Counter({module: name for name, module in model.named_modules()})
            ran = _run(model, stacks[0], counter)
            if ran and (counter.attended or implementation == own):
                return counter.result(layers)
    finally:
        config._attn_implementation = own
    return None


def _run(model: PreTrainedModel, layers: torch.nn.ModuleList, counter: _Counter) -> bool:
    """Run `model` once. Returns whether it could."""
    AttentionInterface.register(COUNTED, counter.attend)
    handles: list[Any] = []
    for layer in layers:
        handles.append(layer.register_forward_pre_hook(counter.enter_layer, with_kwargs=True))
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                handles.append(module.register_forward_pre_hook(counter.enter_linear))
            if module is not layer:
                handles.append(module.register_forward_pre_hook(counter.enter))
            handles.append(module.register_forward_hook(counter.leave))
    tokens = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    hooks = torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor)
    try:
        with _Autocast(), hooks:
            model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    except Exception:
        # Some decide by values, which the meta device has not; any error may follow.
        return False
    finally:
        for handle in handles:
            handle.remove()
    return bool(counter.read)
