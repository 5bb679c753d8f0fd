"""Attention over packed rows without a mask: torch's variable-length flash attention.

`cu_seq_lens_q` (int32 [rows + 1]) has the start of each row of a flattened batch, so rows never
attend to each other and there is no padding. flash-attn is not needed; if its version 4 is
installed, a Hopper GPU computes attention with it.
"""

import fcntl
import inspect
import itertools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface

from stages.shared.activations import QUERIES, in_parts
from stages.shared.fast_path import VARLEN
from stages.shared.process import StageError
from stages.shared.provenance import ABSENT, version_of

_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters
# As tested (tests/test_gpu.py). With heads of 80 values, its gradients are wrong.
FLASH_4, FLASH_4_SIZES = "4.0.0b36", (64, 96, 128, 256)
# flash_attn_varlen_func of FlashAttention 4, once it is used.
_flash_4: Callable[..., Any] | None = None


def use_flash_4(head_size: int) -> bool:
    """Attend with FlashAttention 4 from now on, if it is installed and made for the first GPU and
    for heads of `head_size` values.

    Its backward pass is deterministic too. On GPUs of other generations it is untested.
    """
    global _flash_4
    installed, reason = version_of("flash-attn-4"), ""
    if installed == ABSENT or not _on_hopper() or head_size not in FLASH_4_SIZES:
        return False
    if installed != FLASH_4:
        reason = f"{FLASH_4} was tested"
    else:
        # Its compiler warns of an argument that it passes to itself.
        warnings.filterwarnings("ignore", "Argument aux_data", UserWarning)
        _keep_compiled()
        try:
            from flash_attn.cute import flash_attn_varlen_func as _flash_4
        except Exception as error:  # of packages that do not match
            reason = " ".join(f"{type(error).__name__}: {error}"[:200].split())
    if reason:
        print(
            f"train: flash-attn-4 {installed} is left out ({reason}); to use it: "
            "pip install --no-deps --require-hashes -r requirements-hopper.lock"
        )
    return not reason


def _keep_compiled() -> None:
    """Have FlashAttention 4 keep its kernels on disk, unless the user's variables say otherwise.

    Compiling them takes seconds at each start. By default it would keep them in /tmp, where other
    users may write, and end the run where a file cannot be locked.
    """
    folder, enabled = (f"FLASH_ATTENTION_CUTE_DSL_CACHE_{name}" for name in ("DIR", "ENABLED"))
    if enabled in os.environ:
        return
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        cache = Path(os.environ.get(folder) or home / "flash_attention_4").expanduser()
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (OSError, RuntimeError):  # Without a home it is a RuntimeError.
        return
    os.environ |= {folder: str(cache), enabled: "1"}


def _on_hopper() -> bool:
    """Whether the first GPU is one, under CUDA 13, for which requirements-hopper.lock is."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability(0)[0] != 9:
        return False
    return int((torch.version.cuda or "0").partition(".")[0]) >= 13


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
    one sequence: padding on the right follows the real tokens, which never attend to it.
    """
    if softcap is not None or s_aux is not None:
        raise StageError("varlen attention lacks soft caps and sinks; set train.attention: sdpa")
    batch, _, tokens, _ = query.shape
    if cu_seq_lens_q is None:
        cu_seq_lens_q = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32)
        max_length_q = tokens
    bounds = cu_seq_lens_q.to(query.device)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # Autocast does not know this attention, whose inputs LayerNorm may leave in float32.
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    window = (sliding_window - 1 if sliding_window else -1, 0)
    options: dict[str, Any] = {"scale": scaling, "window_size": window}
    # The kernel shares key heads anyway; newer versions of torch require the flag.
    if _GQA:
        options["enable_gqa"] = True
    assert max_length_q is not None  # transformers passes it with cu_seq_lens_q.
    length = int(max_length_q)
    if in_parts(len(bounds) - 1, len(q), q.shape[1]):
        out = _attend_in_parts(q, k, v, bounds.tolist(), options)
    else:
        out = _attend(q, k, v, bounds, bounds, length, length, options)
    return out.view(batch, tokens, *out.shape[1:]), None


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: torch.Tensor,
    key_bounds: torch.Tensor,
    longest: int,
    longest_key: int,
    options: dict[str, Any],
) -> torch.Tensor:
    if _flash_4 and q.shape[-1] == v.shape[-1] and q.shape[-1] in FLASH_4_SIZES:
        left = options["window_size"][0]
        out, *_ = _flash_4(
            q,
            k,
            v,
            cu_seqlens_q=bounds,
            cu_seqlens_k=key_bounds,
            max_seqlen_q=longest,
            max_seqlen_k=longest_key,
            softmax_scale=options["scale"],
            causal=True,
            window_size=(left if left >= 0 else None, None),
            deterministic=True,
        )
        return out
    out = varlen_attn(q, k, v, bounds, key_bounds, longest, longest_key, **options)
    assert isinstance(out, torch.Tensor)  # A tuple only with return_aux.
    return out


def _attend_in_parts(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: list[int], options: dict[str, Any]
) -> torch.Tensor:
    """Attention of QUERIES queries of a row at a time, with the row's keys up to the last of them.

    The keys' gradient becomes a sum over the parts.
    """
    pieces = []
    for first, last in itertools.pairwise(bounds):
        for start in range(first, last, QUERIES):
            pieces.append((first, start, min(start + QUERIES, last)))
    outputs = []
    lengths = [end - start for _, start, end in pieces]
    for part, (first, _, end) in zip(q.split(lengths), pieces, strict=True):
        count = len(part)
        # The last query is aligned with the last key.
        queries, keys = (
            torch.arange(0, n + 1, n, device=q.device, dtype=torch.int32)
            for n in (count, end - first)
        )
        out = _attend(part, k[first:end], v[first:end], queries, keys, count, end - first, options)
        outputs.append(out)
    return torch.cat(outputs)


def register() -> None:
    """Register `attn_implementation="varlen"` with transformers, without a mask."""
    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, lambda *args, **kwargs: None)
