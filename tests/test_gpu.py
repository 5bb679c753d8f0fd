"""What only a GPU can show. Not part of the normal run: python -m pytest -m gpu

The reference is the plain path in float32 on the GPU: eager attention, one row at a time, PEFT's
own layers. The fast path and the plain bfloat16 path are both held against it.
"""

import importlib
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import families
import pytest
import torch
import yaml
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, get_peft_model
from prepared import make_prepared_workspace

from stages import quantize as quantize_stage
from stages import train as train_stage
from stages.quantize import quantize
from stages.quantizing.nf4_tensors import nf4
from stages.shared import activations, packed
from stages.shared.expert_lora import Factors, stand_ins, target_parameters, use_factors
from stages.shared.fast_path import LIGER
from stages.shared.model import load_base, load_streamed, set_compute_dtype
from stages.shared.outputs import write_sums
from stages.shared.packed import Groups
from stages.shared.packed_storages import Nf4Experts
from stages.shared.placement import Placement
from stages.shared.process import StageError, sha256
from stages.shared.provenance import ABSENT, version_of
from stages.shared.scoring import scored_logits
from stages.shared.streaming import stream_layers
from stages.training import attention
from stages.training.adjusting import apply_liger
from stages.training.checkpoints import SIGNALS, Checkpoints
from stages.training.fused_lora import fuse_lora
from stages.training.offload import HostStash
from stages.training.paged import page_again, state_bytes
from stages.verifying.merged_model import load_merged
from tests.tiny import make_model

pytestmark = pytest.mark.gpu
LENGTHS = (37, 120, 5, 64, 200)
FAMILIES = ("llama", "mistral", "qwen2")


@contextmanager
def liger_put_back(*more: str):
    """Liger replaces classes of transformers' modules, and later models are built of them: their
    MLPs would not be fused, and a plain one would not be plain. A stage has its own process."""
    names = [*(f"transformers.models.{f}.modeling_{f}" for f in FAMILIES), *more]
    modules = [importlib.import_module(name) for name in names]
    before = [dict(vars(module)) for module in modules]
    try:
        yield
    finally:
        for module, names in zip(modules, before, strict=True):
            vars(module).update(names)


@pytest.fixture(scope="module", params=FAMILIES)
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
    base = load_base(folder, torch.device("cuda", 0), kind)
    assert not type(base.model.layers[0].mlp).__name__.startswith("Liger")
    set_compute_dtype(base, dtype)
    if liger:
        apply_liger(base)
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


@liger_put_back()
def fast(folder, bounds=None, offload=False):
    """Loss and gradients of all rows in one flattened batch, as the fast path computes them."""
    model = adapted(folder, "varlen", liger=True)
    stash = HostStash(model.device, sum(LENGTHS) * 256 * 2) if offload else None
    fuse_lora(model, liger=True, placement=Placement(offload=offload), stash=stash)
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


@pytest.mark.parametrize("offload", [False, True])
def test_fast_path_is_as_close_to_float32_as_the_plain_path(folder, offload):
    loss, reference = plain(folder, torch.float32)
    _, plain_gradients = plain(folder, torch.bfloat16)
    fast_loss, fast_gradients = fast(folder, offload=offload)
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


def test_a_long_row_in_parts_is_as_a_whole(monkeypatch):
    torch.manual_seed(0)
    shape = {"query": 8, "key": 2, "value": 2}
    given = {
        name: torch.randn(1, heads, 1000, 64, device="cuda", dtype=torch.bfloat16)
        for name, heads in shape.items()
    }

    def attended():
        leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
        out, _ = attention.varlen_attention(None, **leaves, attention_mask=None)
        (out * torch.linspace(-1, 1, 64, device="cuda")).sum().backward()
        return {"out": out, **{name: x.grad for name, x in leaves.items()}}

    whole = attended()
    for module in (attention, activations):
        monkeypatch.setattr(module, "QUERIES", 256)
    assert max(errors(attended(), whole).values()) < 1e-2


# CUTLASS uses its own deprecated names.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("heads", [(8, 2), (4, 4), (7, 1)])
@pytest.mark.parametrize("size", attention.FLASH_4_SIZES)
def test_flash_attention_4_agrees_with_torchs_kernel_and_repeats(monkeypatch, size, heads, window):
    """As a whole and in parts; with several sequences, and with a long one."""
    monkeypatch.setattr(attention, "_flash_4", None)
    if version_of("flash-attn-4") == ABSENT or torch.cuda.get_device_capability(0)[0] != 9:
        pytest.skip("needs FlashAttention 4 on a Hopper GPU")
    assert attention.use_flash_4(size)
    flash_4 = attention._flash_4
    for lengths in (LENGTHS, (1500,)):
        torch.manual_seed(0)
        count, (query, key) = sum(lengths), heads
        given = {
            name: torch.randn(1, n, count, size, device="cuda")
            for name, n in {"query": query, "key": key, "value": key}.items()
        }
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        options = {"cu_seq_lens_q": ends, "max_length_q": max(lengths), "sliding_window": window}

        def attended(given=given, options=options):
            leaves = {name: x.bfloat16().requires_grad_() for name, x in given.items()}
            out, _ = attention.varlen_attention(None, **leaves, attention_mask=None, **options)
            (out * torch.linspace(-1, 1, size, device="cuda")).sum().backward()
            return {"out": out, **{name: x.grad for name, x in leaves.items()}}

        monkeypatch.setattr(attention, "_flash_4", None)
        theirs = attended()
        monkeypatch.setattr(attention, "_flash_4", flash_4)
        ours, again = attended(), attended()
        assert all(torch.equal(x, again[name]) for name, x in ours.items())
        assert max(errors(ours, theirs).values()) < 1e-2
    for module in (attention, activations):
        monkeypatch.setattr(module, "QUERIES", 256)
    assert max(errors(attended(), theirs).values()) < 1e-2


def test_offloading_gives_back_what_it_took():
    """With memory that is freed and taken again at once, and the GPU behind all the time."""
    values = [torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
    stash = HostStash(torch.device("cuda", 0), values[0].nbytes)
    slots = [stash.slot() for _ in values]
    for step in range(1, 4):
        for slot, value in zip(slots, values, strict=True):
            tensor = value * step
            slot.put(tensor)
            keep_busy()
            del tensor
            torch.full_like(value, torch.nan)
        for slot, value in reversed(list(zip(slots, values, strict=True))):
            tensor = slot.take()
            keep_busy()
            assert torch.equal(tensor, value * step), (step, slot.number)
            del tensor
            torch.full_like(value, torch.nan)
    assert not stash.leaving
    assert not any(slot.waiting is not None or slot.returning for slot in slots)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (7, 100), (1000, 192), (4096, 1408)])
def test_weights_are_those_that_bitsandbytes_dequantizes(shape, nested, dtype):
    torch.manual_seed(3)
    weight = torch.randn(shape, device="cuda", dtype=dtype) * torch.rand(shape[1], device="cuda")
    packed, state = quantize_4bit(
        weight.to(dtype), blocksize=64, quant_type="nf4", compress_statistics=nested
    )
    assert torch.equal(kernels().dequantize(packed, state), dequantize_4bit(packed, state))


@pytest.mark.parametrize(
    "name",
    sorted(name for name, one in families.FAMILIES.items() if one.kind in LIGER and not one.text),
)
def test_liger_computes_what_its_families_do(name):
    model = families.model_of(families.FAMILIES[name]).cuda()
    ids = torch.arange(3, 3 + 24, device="cuda")[None]
    expected = model(input_ids=ids, use_cache=False).logits.detach().float()
    with liger_put_back(type(model).__module__):
        apply_liger(model)
        found = model(input_ids=ids, use_cache=False).logits
        found.float().square().mean().backward()
    assert (found.detach().float() - expected).norm() < 0.03 * expected.norm()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_swiglu_and_its_gradients_are_those_of_liger():
    from liger_kernel.ops.swiglu import swiglu_backward, swiglu_forward

    torch.manual_seed(4)
    g, u, dh = (torch.randn(333, 1408, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    found = [x.clone() for x in (g, u, dh)]
    found = kernels().LigerSwiglu.backward(*found)
    product = swiglu_forward(g, u)[2]
    expected = product, *swiglu_backward(g, u, dh)
    for x, y in zip(found, expected, strict=True):
        assert x.isfinite().all()
        assert torch.equal(x, y)


def kernels():
    """Imported late: without a GPU there may be no Triton and no Liger."""
    from stages.training import kernels

    return kernels


def keep_busy():
    matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    for _ in range(20):
        matrix = matrix @ matrix * 1e-2


# The same bytes: 24 steps, twice undisturbed, and stopped at the tenth and resumed elsewhere.
STOPPED = 10
# bitsandbytes pages the state of a matrix from 1e5 values on: 128 x 1024 here.
WIDE = {"hidden_size": 1024, "intermediate_size": 1024, "head_dim": 64, "num_attention_heads": 16}
TRAIN = {
    "batch_size": 2,
    "gradient_accumulation": 2,
    "batching": "shuffle",
    "schedule": "cosine",
    "epochs": 2.0,
    "learning_rate": 1e-3,
}
LORA = {"r": 128, "alpha": 128}
# Changes to both sections.
RUNS = {
    "shuffle": ({}, {}),
    "packing": ({"batching": "packing", "gradient_checkpointing": True}, {}),
    "group_by_length": ({"batching": "group_by_length", "gradient_checkpointing": True}, {}),
    "dropout": ({}, {"dropout": 0.1}),
    "sdpa": ({"attention": "sdpa"}, {}),
    "paged_adamw_32bit": ({"optimizer": "paged_adamw_32bit"}, {}),
    "paged_adamw_8bit": ({"optimizer": "paged_adamw_8bit"}, {}),
}


def outcome(workspace):
    """What must be the same, by name."""
    names = ("models/adapter/adapter_model.safetensors", "metrics/train.json", "metrics/curve.csv")
    return {name: sha256(workspace / name) for name in names}


def stop(patch):
    """Have the next training of this process stopped by SIGTERM in the middle."""
    on_step_end = Checkpoints.on_step_end

    def stopping(self, args, state, control, **kwargs):
        if state.global_step == STOPPED:
            signal.raise_signal(signal.SIGTERM)
        on_step_end(self, args, state, control, **kwargs)

    patch.setattr(Checkpoints, "on_step_end", stopping)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workspace with a quantized base that is wide enough for paged state."""
    folder = tmp_path_factory.mktemp("same")
    workspace = make_prepared_workspace(folder / "ws", lora=LORA, train=TRAIN)
    make_model(workspace / "models/base", **WIDE)
    write_sums(workspace / "models/base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        quantize_stage.main()
    return workspace


# Warnings are errors here: FlashAttention 4 could not be imported and would be left out, but the
# last run, a process of its own, would use it.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", RUNS)
def test_runs_give_the_same_bytes_undisturbed_and_resumed(name, trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "ws")
    monkeypatch.chdir(tmp_path / "ws")
    params = yaml.safe_load(Path("params.yaml").read_text())
    for section, changes in zip(("train", "lora"), RUNS[name], strict=True):
        params[section] |= changes
    Path("params.yaml").write_text(yaml.safe_dump(params))
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    found = []
    for _ in range(2):
        with liger_put_back():
            train_stage.main()
        found.append(outcome(tmp_path / "ws"))
    with monkeypatch.context() as stopped, liger_put_back():
        stop(stopped)
        with pytest.raises(StageError, match="stopped by SIGTERM"):
            train_stage.main()
    said = subprocess.run(
        [sys.executable, "-m", "stages.train"],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    ).stdout
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert f"train: resuming from checkpoint-{STOPPED}\n" in said, said
    found.append(outcome(tmp_path / "ws"))
    assert found[0] == found[1] == found[2], (found, said)


@pytest.mark.parametrize("bits", [8, 32])
def test_paged_state_is_paged_again_after_loading(bits):
    """bitsandbytes loads it as plain GPU memory: a resumed run would need a larger card."""
    from bitsandbytes.optim import AdamW

    def make():
        parameter = torch.nn.Parameter(torch.ones(512, 512, device="cuda"))
        parameter.grad = torch.full_like(parameter, 0.1)
        return parameter, AdamW([parameter], optim_bits=bits, is_paged=True)

    (one, before), (other, after) = make(), make()
    before.step()
    after.load_state_dict(before.state_dict())
    assert state_bytes(after)[1] == 0
    page_again(after)
    assert state_bytes(after)[1] == state_bytes(before)[1] > 0
    other.data.copy_(one)
    for optimizer in (before, after):
        optimizer.step()
    assert torch.equal(one, other)


def test_a_gpu_quantizes_to_the_bytes_of_the_cpu():
    torch.manual_seed(0)
    weights = {
        "normal": torch.randn(4096, 4096) * 0.02,
        "outliers": torch.randn(1024, 4096) * torch.rand(1024, 4096) ** 20,
        "zeros": torch.cat([torch.zeros(64, 256), torch.randn(64, 256)]),
        "odd": torch.randn(7, 100),
    }
    for name, weight in weights.items():
        for double_quant in (True, False):
            cpu, gpu = (
                quantize_stage.quantized_tensors("w", weight, double_quant, torch.device(device))
                for device in ("cpu", "cuda")
            )
            assert cpu.keys() == gpu.keys()
            assert all(torch.equal(cpu[key], gpu[key]) for key in cpu), (name, double_quant)


@pytest.mark.parametrize("rank", [16, 64, 256])
@pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (1000, 1100)])
def test_a_gpu_merges_to_the_bytes_of_the_cpu(rank, shape):
    torch.manual_seed(0)
    a, b = torch.randn(rank, shape[1]) * 0.02, torch.randn(shape[0], rank) * 0.02
    assert torch.equal(b @ a, (b.cuda() @ a.cuda()).cpu())


def test_a_merged_model_in_host_memory_computes_what_one_on_the_gpu_does(tmp_path):
    make_model(tmp_path, "llama", hidden_size=256, head_dim=64)
    scored = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in rows()]
    gpu, host = torch.device("cuda", 0), torch.device("cpu")
    expected = [x for *_, x in scored_logits(load_merged(tmp_path, gpu), scored)]
    for room in (0.0, 1e9):  # host memory, the GPU
        model = load_merged(tmp_path, host)
        streamer = stream_layers(model, gpu, 2, "ring")
        streamer.room = room
        found = [x for *_, x in scored_logits(model, scored, streamer=streamer)]
        assert streamer.sent == 2
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_products_of_packed_experts_are_those_of_dense_ones(monkeypatch, transposed):
    """Forward and backward, whole and in chunks, against each expert by itself in float32; with an
    expert that has no token."""
    torch.manual_seed(0)
    weights = [0.05 * torch.randn(384, 256) for _ in range(5)]
    parts = [nf4(weight, True, torch.device("cpu")) for weight in weights]
    stack = Nf4Experts(
        torch.stack([codes.view(384, 128) for codes, _ in parts]),
        torch.stack([state.absmax for _, state in parts]),
        torch.stack([state.state2.absmax for _, state in parts]),
        torch.stack([state.offset for _, state in parts]),
    ).cuda()
    stack.transposed = transposed
    counts = torch.tensor([70, 1, 0, 129, 33])
    groups = Groups(counts.cumsum(0).cuda())
    inputs, outputs = (384, 256) if transposed else (256, 384)
    x = torch.randn(int(counts.sum()), inputs).bfloat16().cuda().requires_grad_()
    dy = torch.randn(len(x), outputs).bfloat16().cuda()
    dense = stack.dense(0, 5, torch.bfloat16).float()
    each = [stack.dense(e, e + 1, torch.bfloat16) for e in range(5)]
    assert torch.equal(dense, torch.cat(each).float())
    dense = dense if transposed else dense.mT
    rows = x.detach().float().split(counts.tolist())
    expected = torch.cat([a @ w for a, w in zip(rows, dense, strict=True)])
    expected_dx = torch.cat(
        [a @ w.mT for a, w in zip(dy.float().split(counts.tolist()), dense, strict=True)]
    )
    for at_once in (5, 2, 1):
        monkeypatch.setattr(packed, "CHUNK_BYTES", at_once * 2 * 384 * 256)
        x.grad = None
        y = stack(x, Groups(groups.ends))
        y.backward(dy)
        for found, exact in ((y, expected), (x.grad, expected_dx)):
            assert (found.float() - exact).norm() < 0.005 * exact.norm()


@pytest.mark.parametrize("shape", [(512, 2048), (4096, 2048), (1024, 4096), (14336, 4096)])
@pytest.mark.parametrize("tokens", [1, 4, 8, 17, 24, 32])
def test_products_of_few_tokens_are_right_and_repeat(shape, tokens):
    """bitsandbytes has kernels of its own for them, without gradients: those of answers, of short
    rows and of the trial before training."""
    torch.manual_seed(tokens)
    weight = (0.02 * torch.randn(shape)).bfloat16().cuda()
    codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    x = torch.randn(tokens, shape[1]).bfloat16().cuda()
    exact = x.float() @ dequantize_4bit(codes, state).float().T
    with torch.no_grad():
        first = matmul_4bit(x, codes.t(), state)
        assert (first.float() - exact).norm() < 0.01 * exact.norm()
        for _ in range(300):
            assert torch.equal(matmul_4bit(x, codes.t(), state), first)


def test_grouped_products_repeat_where_most_experts_have_no_token():
    """As in the trial before training, where all tokens have the same 8 experts."""
    torch.manual_seed(0)
    weights = torch.randn(128, 768, 2048).bfloat16().cuda().mT
    for tokens in (17, 24, 41):
        counts = torch.tensor([tokens] * 8 + [0] * 120)
        ends = counts.cumsum(0).int().cuda()
        x = torch.randn(8 * tokens, 2048).bfloat16().cuda()
        exact = torch.cat(
            [a.float() @ w.float() for a, w in zip(x.split(tokens), weights[:8], strict=True)]
        )
        first = torch.nn.functional.grouped_mm(x, weights, offs=ends)
        assert (first.float() - exact).norm() < 0.01 * exact.norm()
        for _ in range(300):
            assert torch.equal(torch.nn.functional.grouped_mm(x, weights, offs=ends), first)


@pytest.mark.parametrize("rank", [8, 6])
def test_low_rank_products_of_experts_are_those_of_each_expert(rank):
    """Forward and backward against each expert by itself in float32; the products of a rank that is
    no multiple of 8 are not grouped."""
    torch.manual_seed(0)
    counts = torch.tensor([70, 1, 0, 129, 33])
    groups = Groups(counts.cumsum(0).cuda())
    a = torch.randn(5, rank, 256, device="cuda", requires_grad=True)
    b = torch.randn(5, 384, rank, device="cuda", requires_grad=True)
    x = torch.randn(int(counts.sum()), 256).bfloat16().cuda().requires_grad_()
    dy = torch.randn(len(x), 384).bfloat16().cuda()
    factors = Factors(SimpleNamespace(disable_adapters=False, scaling={"default": 0.5}))
    factors.stacked = lambda: (a, b)
    with torch.autocast("cuda", torch.bfloat16):
        y = factors(torch.zeros(len(x), 384, device="cuda", dtype=torch.bfloat16), x, groups)
    y.backward(dy)
    found = y, x.grad, a.grad, b.grad
    exact = [t.detach().float().requires_grad_() for t in (x, a, b)]
    rows = exact[0].split(counts.tolist())
    own = [0.5 * r @ p.T @ q.T for r, p, q in zip(rows, exact[1], exact[2], strict=True)]
    expected = torch.cat(own)
    expected.backward(dy.float())
    for ours, theirs in zip(found, (expected, *(t.grad for t in exact)), strict=True):
        assert (ours.float() - theirs).norm() < 0.02 * theirs.norm()
    assert not a.grad[2].any()
    assert not b.grad[2].any()


@pytest.mark.parametrize("experts", [False, True])
def test_a_mixture_of_experts_trains_alike_wherever_it_lies(experts, tmp_path):
    """Twice the same bytes, resident and streamed, with adapters on experts too."""
    settings = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
    shape = {"hidden_size": 256, "head_dim": 64, "num_hidden_layers": 4} | settings
    make_model(tmp_path / "base", "qwen3_moe", **shape)
    (tmp_path / "nf4").mkdir()
    quantize(tmp_path / "base", tmp_path / "nf4", double_quant=True)
    gpu, ids = torch.device("cuda", 0), torch.arange(600).view(2, 300).cuda() % 250 + 3
    found = []
    for streamed in (0, 0, 4):
        if streamed:
            model, _ = load_streamed(tmp_path / "nf4", gpu, streamed, attention="sdpa")
        else:
            model = load_base(tmp_path / "nf4", gpu, "sdpa")
        torch.manual_seed(1)
        config = LoraConfig(
            r=8,
            target_modules=["q_proj", "v_proj"],
            target_parameters=target_parameters(model) if experts else None,
            init_lora_weights=False,
        )
        with stand_ins(model):
            model = get_peft_model(model, config).train()
        use_factors(model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        with torch.autocast("cuda", torch.bfloat16):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append(gradients(model))
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())
