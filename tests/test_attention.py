"""Rows flattened into one batch give the logits of each row alone."""

import fcntl
import itertools
import os
import sys

import pytest
import torch
from families import FAMILIES
from tiny import ROOT, SHAPE
from transformers import AutoConfig, AutoModelForCausalLM

from stages.shared import activations
from stages.shared.fast_path import FLATTENED, MASKED, VARLEN, choose_attention, supports_varlen
from stages.shared.params import Train
from stages.shared.process import StageError
from stages.shared.provenance import ABSENT
from stages.training import attention

LENGTHS = (20, 13, 30)
LOCAL = SHAPE | {"sliding_window": 8, "pad_token_id": 2}
# Settings that a tiny model of a family needs.
# fmt: off
PECULIAR = (
    "codegen", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "gemma3n_text", "gemma4_text",
    "glm4_moe", "gpt_neo", "gpt_oss", "gptj", "granitemoe", "llama4_text", "minicpm3", "mixtral",
    "olmoe", "qwen2_moe", "qwen3_moe",
)
# fmt: on
OWN = {name: FAMILIES[name].settings | {"vocab_size": 264} for name in PECULIAR}
TRAIN = {
    "epochs": 1.0,
    "batch_size": 2,
    "gradient_accumulation": 1,
    "learning_rate": 1e-3,
    "schedule": "linear",
    "warmup_ratio": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "optimizer": "adamw_torch_fused",
    "gradient_checkpointing": False,
    "batching": "shuffle",
    "attention": "auto",
    "keep": "last",
    "patience": None,
}


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    """What the kernel computes, on a CPU."""
    attention.register()
    monkeypatch.setattr(attention, "varlen_attn", reference)
    monkeypatch.setattr(attention, "_flash_4", None)


def reference(q, k, v, bounds, key_bounds, *longest, scale, window_size, enable_gqa=False):
    assert longest == (bounds.diff().max(), key_bounds.diff().max())
    parts = []
    ends = (itertools.pairwise(x.tolist()) for x in (bounds, key_bounds))
    for (start, end), (first, last) in zip(*ends, strict=True):
        row = (x.transpose(0, 1)[None] for x in (q[start:end], k[first:last], v[first:last]))
        # The last query is aligned with the last key.
        queries = torch.arange(end - start) + (last - first) - (end - start)
        back = queries[:, None] - torch.arange(last - first)
        seen = (back >= 0) & (back <= (window_size[0] if window_size[0] >= 0 else last))
        result = torch.nn.functional.scaled_dot_product_attention(
            *row, attn_mask=seen, scale=scale, enable_gqa=True
        )
        parts.append(result[0].transpose(0, 1))
    return torch.cat(parts)


def make(family, kind):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **LOCAL | OWN.get(family, {}))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=kind)
    return model.eval()


def rows():
    torch.manual_seed(3)
    return [torch.randint(3, 260, (length,)) for length in LENGTHS]


def flattened(model):
    """Logits of each row, given as trl's collator gives them."""
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    logits = model(
        input_ids=torch.cat(rows())[None],
        position_ids=positions,
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=max(LENGTHS),
        max_length_k=max(LENGTHS),
        use_cache=False,
    ).logits
    return logits[0].split(LENGTHS)


@torch.no_grad()
def mixing(family, kind):
    """Largest change of a logit when rows are flattened, by the largest logit."""
    plain = make(family, None)
    alone = [plain(input_ids=row[None], use_cache=False).logits[0] for row in rows()]
    together = flattened(plain if kind is None else make(family, kind))
    pairs = zip(alone, together, strict=True)
    return max((a - b).abs().max().item() for a, b in pairs) / alone[0].abs().max().item()


@pytest.mark.parametrize("family", sorted(FLATTENED | MASKED))
def test_flattened_rows_keep_apart(family):
    assert mixing(family, None) < 1e-4
    if supports_varlen(AutoConfig.for_model(family, **LOCAL | OWN.get(family, {}))):
        assert mixing(family, VARLEN) < 1e-4


@pytest.mark.parametrize("family", ["stablelm", "nemotron"])
def test_a_family_that_mixes_rows_without_a_mask_is_given_one(family):
    assert mixing(family, VARLEN) > 1e-2
    packing = Train(**TRAIN | {"batching": "packing"})
    assert choose_attention(packing, AutoConfig.for_model(family), gpu=True) == "sdpa"


def test_gpt_oss_mixes_rows_and_is_padded():
    """Its model passes no positions to its masks."""
    assert mixing("gpt_oss", None) > 1e-2
    config = AutoConfig.for_model("gpt_oss")
    assert choose_attention(Train(**TRAIN), config, gpu=True) == "eager"
    packing = Train(**TRAIN | {"batching": "packing"})
    with pytest.raises(StageError, match=r"gpt_oss is not known to keep packed rows apart"):
        choose_attention(packing, config, gpu=True)


@pytest.mark.parametrize("family", ["bloom", "xglm"])
def test_a_family_that_mixes_rows_is_noticed_and_not_flattened(family):
    assert mixing(family, VARLEN) > 1e-2
    config = AutoConfig.for_model(family)
    assert choose_attention(Train(**TRAIN), config, gpu=True) != VARLEN
    for changed, said in (
        ({"attention": "varlen"}, f"train.attention: varlen does not support {family}"),
        (
            {"batching": "packing"},
            f"train.batching: {family} is not known to keep packed rows apart",
        ),
    ):
        with pytest.raises(StageError, match=said):
            choose_attention(Train(**TRAIN | changed), config, gpu=True)


@pytest.mark.parametrize("family", ["llama", "gemma2", "xglm"])
def test_without_varlen_auto_is_what_transformers_takes(family):
    """sdpa cannot cap logits (gemma2), and old code lacks it (xglm); plan must know both."""
    model = make(family, None)
    kind = model.config._attn_implementation
    assert choose_attention(Train(**TRAIN), AutoConfig.for_model(family), gpu=False) == kind
    asked = Train(**TRAIN | {"attention": "sdpa"})
    if kind == "sdpa":
        assert choose_attention(asked, model.config, gpu=False) == "sdpa"
    else:
        with pytest.raises(StageError, match=f"train.attention: sdpa does not support {family}"):
            choose_attention(asked, model.config, gpu=False)


def test_varlen_needs_a_gpu():
    asked, config = Train(**TRAIN | {"attention": "varlen"}), AutoConfig.for_model("llama")
    assert choose_attention(asked, config, gpu=True) == VARLEN
    with pytest.raises(StageError, match="varlen needs a GPU; set auto"):
        choose_attention(asked, config, gpu=False)


def test_float32_is_cast_as_autocast_would(monkeypatch):
    """LayerNorm under autocast gives float32, which the kernel does not take."""
    taken = []

    def kernel(q, k, v, *rest, **options):
        taken.extend((q.dtype, k.dtype, v.dtype))
        return q

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    x = torch.zeros(1, 2, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        attention.varlen_attention(None, x, x, x.bfloat16(), None)
    assert taken == [torch.bfloat16] * 3


@pytest.mark.parametrize("window", [None, 5])
def test_flash_attention_4_computes_what_torchs_kernel_does(monkeypatch, window):
    """With the head sizes that it was tested with; its gradients are wrong for 80."""
    used = []

    def flash_4(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
        assert options["causal"]
        assert options["deterministic"]
        used.append(q.shape[-1])
        window = [-1 if side is None else side for side in options["window_size"]]
        longest = (max_seqlen_q, max_seqlen_k)
        options = {"scale": options["softmax_scale"], "window_size": window}
        return reference(q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, **options), None

    def attended(size):
        torch.manual_seed(0)
        given = [torch.randn(1, n, sum(LENGTHS), size) for n in (4, 2, 2)]
        bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
        options = {"cu_seq_lens_q": bounds, "max_length_q": max(LENGTHS), "scaling": 0.1}
        return attention.varlen_attention(None, *given, None, sliding_window=window, **options)[0]

    expected = {size: attended(size) for size in (64, 80)}
    monkeypatch.setattr(attention, "_flash_4", flash_4)
    for size, value in expected.items():
        assert torch.equal(attended(size), value)
    assert used == [64]


def test_flash_attention_4_is_left_out_if_it_was_not_tested(monkeypatch, capsys):
    lock = (ROOT / "requirements-hopper.lock").read_text()
    assert f"flash-attn-4=={attention.FLASH_4} " in lock
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    # As if it could not be imported, also where it is installed.
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr(attention, "_keep_compiled", lambda: None)
    for capability, version, said in (
        ((9, 0), ABSENT, ""),
        ((8, 9), attention.FLASH_4, ""),
        ((9, 0), "4.9", "train: flash-attn-4 4.9 is left out (4.0.0b36 was tested); to use it: "),
        ((9, 0), attention.FLASH_4, "train: flash-attn-4 4.0.0b36 is left out (ModuleNotFoundErr"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        monkeypatch.setattr(attention, "version_of", lambda name, found=version: found)
        assert not attention.use_flash_4(80)
        assert capsys.readouterr().out == ""
        assert not attention.use_flash_4(128)
        printed = capsys.readouterr().out
        assert printed.startswith(said)
        assert bool(printed) == bool(said)


def test_kernels_of_flash_attention_4_are_kept_where_files_can_be_locked(monkeypatch, tmp_path):
    folder = "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"
    enabled = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"

    def kept(**variables):
        monkeypatch.setattr(os, "environ", dict(variables))
        attention._keep_compiled()
        return {name: os.environ[name] for name in (folder, enabled) if name in os.environ}

    own = str(tmp_path / "flash_attention_4")
    inside = str(tmp_path / ".cache" / "flash_attention_4")
    assert kept(XDG_CACHE_HOME=str(tmp_path)) == {folder: own, enabled: "1"}
    assert kept(HOME=str(tmp_path)) == {folder: inside, enabled: "1"}
    assert kept(XDG_CACHE_HOME=str(tmp_path), **{enabled: "0"}) == {enabled: "0"}
    (tmp_path / "file").touch()
    bad, chosen = str(tmp_path / "file"), {folder: str(tmp_path / "chosen")}
    assert kept(XDG_CACHE_HOME=bad) == {}
    assert kept(XDG_CACHE_HOME=bad, **chosen) == chosen | {enabled: "1"}
    assert kept(XDG_CACHE_HOME=str(tmp_path), **{folder: bad}) == {folder: bad}
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError("no locks")))
    assert kept(XDG_CACHE_HOME=str(tmp_path)) == {}


@pytest.mark.parametrize("window", [None, 5])
def test_few_long_rows_are_computed_in_parts(monkeypatch, window):
    torch.manual_seed(0)
    heads = {"query": 4, "key": 2, "value": 2}
    given = {name: torch.randn(1, n, 30, 8, dtype=torch.float64) for name, n in heads.items()}
    queries = []

    def noted(q, *rest, **options):
        queries.append(len(q))
        return reference(q, *rest, **options)

    def attended():
        leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
        out, _ = attention.varlen_attention(
            None,
            **leaves,
            attention_mask=None,
            sliding_window=window,
            cu_seq_lens_q=torch.tensor([0, 20, 30], dtype=torch.int32),
            max_length_q=20,
        )
        (out * torch.arange(8)).sum().backward()
        return out, *(x.grad for x in leaves.values())

    monkeypatch.setattr(attention, "varlen_attn", noted)
    whole = attended()
    for module in (attention, activations):
        monkeypatch.setattr(module, "QUERIES", 8)
    for found, expected in zip(attended(), whole, strict=True):
        torch.testing.assert_close(found, expected)
    assert queries == [30, 8, 8, 4, 8, 2]
