"""What only a GPU can show. Not part of the normal run: python -m pytest -m gpu

The reference is the plain path in float32 on the GPU: eager attention, one row at a time, PEFT's
own layers. The fast path and the plain bfloat16 path are both held against it.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from stages.quantize import quantize
from stages.shared import attention
from stages.shared.fused_lora import fuse_lora
from stages.shared.model import load_base, set_compute_dtype
from stages.shared.trainer import LIGER_OFF, LIGER_PARTS
from tests.tiny import make_model

pytestmark = pytest.mark.gpu
LENGTHS = (37, 120, 5, 64, 200)


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    shape = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 4}
    make_model(folder / "base", request.param, **shape)
    (folder / "nf4").mkdir()
    quantize(folder / "base", folder / "nf4", double_quant=True)
    return folder / "nf4"


def rows():
    torch.manual_seed(5)
    return [torch.randint(3, 260, (length,)) for length in LENGTHS]


def adapted(folder, kind, dtype=torch.bfloat16, liger=False):
    attention.register()
    base = load_base(folder, torch.device("cuda", 0), kind)
    set_compute_dtype(base, dtype)
    if liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=base, **LIGER_PARTS, **LIGER_OFF)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(base, config).train()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape) * 0.05).to("cuda")
    return model


def gradients(model):
    return {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.requires_grad}


def plain(folder, dtype):
    """Loss and gradients row by row, in `dtype`."""
    model = adapted(folder, "eager" if dtype == torch.float32 else "sdpa", dtype)
    total = 0.0
    tokens = sum(len(row) - 1 for row in rows())
    for row in rows():
        ids = row[None].cuda()
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum") / tokens
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def fast(folder, bounds=None):
    """Loss and gradients of all rows in one flattened batch, as the fast path computes them."""
    model = adapted(folder, "varlen", liger=True)
    fuse_lora(model, liger=True, checkpointing=True)
    ids = torch.cat(rows())[None].cuda()
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    bounds = (ends if bounds is None else bounds).to(torch.int32)
    labels = ids.clone()
    labels[0, ends[:-1]] = -100
    with torch.autocast("cuda", torch.bfloat16):
        logits = model(
            input_ids=ids,
            position_ids=torch.cat([torch.arange(n) for n in LENGTHS])[None].cuda(),
            cu_seq_lens_q=bounds,
            cu_seq_lens_k=bounds,
            max_length_q=int(bounds.diff().max()),
            max_length_k=int(bounds.diff().max()),
            use_cache=False,
        ).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), labels[0, 1:])
    loss.backward()
    return loss.item(), gradients(model)


def errors(found, expected):
    return {n: ((found[n] - expected[n]).norm() / expected[n].norm()).item() for n in expected}


def test_fast_path_is_as_close_to_float32_as_the_plain_path(folder):
    loss, reference = plain(folder, torch.float32)
    _, plain_gradients = plain(folder, torch.bfloat16)
    fast_loss, fast_gradients = fast(folder)
    assert all(gradient.any() for gradient in fast_gradients.values())
    assert fast_loss == pytest.approx(loss, rel=5e-3)
    ours, theirs = errors(fast_gradients, reference), errors(plain_gradients, reference)
    print(f"largest error: fast {max(ours.values()):.4f}, plain {max(theirs.values()):.4f}")
    for name, error in ours.items():
        assert error < max(0.02, 2 * theirs[name]), name


def test_attention_across_rows_would_be_seen(folder):
    _, reference = plain(folder, torch.float32)
    leaking = torch.tensor([0, sum(LENGTHS)])
    _, found = fast(folder, leaking)
    assert max(errors(found, reference).values()) > 0.2
