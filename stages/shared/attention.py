"""Attention over packed rows without a mask: torch's variable-length flash attention.

`cu_seq_lens_q` (int32 [rows + 1]) tells where each row of a flattened batch begins, so rows
never attend to each other and no token is padding. No build of flash-attn is needed.
"""

import inspect

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig

from stages.shared.stage import StageError

NAME = "varlen"
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
    options = {"scale": scaling, "window_size": (sliding_window - 1 if sliding_window else -1, 0)}
    # The kernel shares key heads by itself; newer versions of torch want to hear that it is meant.
    if _GQA:
        options["enable_gqa"] = True
    length = int(max_length_q)
    out = varlen_attn(q, k, v, bounds, bounds, length, length, **options)
    return out.view(batch, tokens, *out.shape[1:]), None


def supports(config: PretrainedConfig) -> bool:
    """Whether plain softmax attention is all that the model asks for (no soft cap, no sinks)."""
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return capped is None and config.model_type != "gpt_oss"


def register() -> None:
    """Make `attn_implementation="varlen"` known to transformers, with no mask built for it."""
    AttentionInterface.register(NAME, varlen_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
