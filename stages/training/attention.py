"""Attention over packed rows without a mask: torch's variable-length flash attention.

`cu_seq_lens_q` (int32 [rows + 1]) tells where each row of a flattened batch begins, so rows
never attend to each other and no token is padding. No build of flash-attn is needed.
"""

import inspect

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig

from stages.shared.params import Train
from stages.shared.process import StageError

NAME = "varlen"
# Families seen to keep the rows of a flattened batch apart, with this attention and with a mask
# (tests/test_attention.py). Others take no notice of where a row begins, attend by code of their
# own (and here without any mask), or carry a state from token to token.
FLATTENED = {
    "cohere",
    "cohere2",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "gpt_neox",
    "granite",
    "llama",
    "ministral",
    "ministral3",
    "mistral",
    "olmo2",
    "olmo3",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
    "starcoder2",
}
_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


def varlen_attention(
    module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    softcap: None = None,
    s_aux: None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention of query [batch, heads, tokens, d] and key, value [batch, kv heads, …].

    Returns ([batch, tokens, heads, d], None). Without `cu_seq_lens_q` every row of the batch is
    one sequence: padding on the right only follows real tokens, which never look at it.
    """
    if softcap is not None or s_aux is not None:
        raise StageError("varlen attention has no soft cap and no sinks; set train.attention: sdpa")
    batch, _, tokens, _ = query.shape
    if cu_seq_lens_q is None:
        cu_seq_lens_q = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32)
        max_length_q = tokens
    bounds = cu_seq_lens_q.to(query.device)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # It knows the other attentions, and gives this one what LayerNorm left in float32.
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    options = {"scale": scaling, "window_size": (sliding_window - 1 if sliding_window else -1, 0)}
    # The kernel shares key heads by itself; newer versions of torch want to hear that it is meant.
    if _GQA:
        options["enable_gqa"] = True
    length = int(max_length_q)
    out = varlen_attn(q, k, v, bounds, bounds, length, length, **options)
    return out.view(batch, tokens, *out.shape[1:]), None


def supports(config: PretrainedConfig) -> bool:
    """Whether varlen attention computes all that the model asks for (it has no soft cap)."""
    capped = getattr(config, "attn_logit_softcapping", None)
    return config.model_type in FLATTENED and capped is None


def check(train: Train, config: PretrainedConfig) -> None:
    """Raise StageError when `train` flattens rows that would then see each other."""
    kind, family = train.attention, config.model_type
    reason = f"{family} is not known to keep rows apart that lie behind each other"
    if kind == NAME and not supports(config):
        raise StageError(f"train.attention: varlen does not do what {family} needs; set auto")
    if kind == "flash_attention_2" and family not in FLATTENED:
        raise StageError(f"train.attention: {reason}; set auto")
    if train.batching == "packing" and family not in FLATTENED:
        raise StageError(f"train.batching: {reason}; set group_by_length")


def register() -> None:
    """Make `attn_implementation="varlen"` known to transformers, with no mask built for it."""
    AttentionInterface.register(NAME, varlen_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
