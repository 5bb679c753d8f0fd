"""The memory model against what PEFT, bitsandbytes and autograd really save, on tiny models."""

import ast
import importlib.util
import weakref
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from moe import moe_config
from peft import LoraConfig, get_peft_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama import modeling_llama

from benchmarks.random_models import build, config_of, random_experts
from benchmarks.vram import ATTENTION, Point, prepare, random_rows, training_of
from stages.quantize import quantize
from stages.shared import activations, placement
from stages.shared.activations import (
    attention_saved,
    attention_working,
    mlp_saved,
    mlp_working,
    norm_saved,
)
from stages.shared.adapted import targets_as_written
from stages.shared.base_bytes import NF4_BYTES, weights_bytes
from stages.shared.decoder_shape import Linear, Shape, Training, adapter_parameters, in_halves
from stages.shared.expert_lora import stand_ins, target_parameters, use_factors
from stages.shared.experts import expert_tensors
from stages.shared.fast_path import LIGER
from stages.shared.kept import FLOAT32
from stages.shared.packed import compute_packed, put_packed
from stages.shared.placement import Placement
from stages.shared.vram import sizes_of
from stages.shared.workload import match_targets, read_model, shape_of
from stages.training import attention
from stages.training.fused_lora import fuse_lora
from tests.tiny import make_model

ARCHITECTURES = ["llama", "mistral", "qwen2", "gemma"]
TOKENS = 256
# A prime, so that a dimension is a multiple of it only if it counts tokens.
PRIME = 251


def run_of(shape, **changes):
    plain = Training(
        method="lora",
        double_quant=True,
        rank=8,
        targets=match_targets(shape, "all-linear"),
        dropout=0.0,
        optimizer="adamw_torch_fused",
        rows=1,
        sequences=8,
        tokens=TOKENS,
        learned_tokens=TOKENS,
        accumulation=1,
        checkpointing=False,
        offloading=False,
        attention="varlen",
        liger=False,
        fused_lora=False,
    )
    return replace(plain, **changes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for arch in ARCHITECTURES:
        made[arch] = tmp_path_factory.mktemp(arch)
        make_model(made[arch], arch, tie_word_embeddings=arch in ("qwen2", "gemma"))
    return made


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["mlp.down_proj"]])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_parameters_are_those_of_peft(folders, arch, targets):
    _, shape = read_model(folders[arch])
    model = AutoModelForCausalLM.from_pretrained(folders[arch])
    assert shape.parameters == model.num_parameters()
    adapted = get_peft_model(model, LoraConfig(r=6, target_modules=targets, task_type="CAUSAL_LM"))
    matched = match_targets(shape, targets)
    assert adapter_parameters(shape, 6, matched) == adapted.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("double_quant", [True, False])
def test_quantized_weights_are_the_bytes_of_the_checkpoint(tmp_path, double_quant):
    from safetensors import safe_open

    wide = {"hidden_size": 256, "intermediate_size": 512}
    make_model(tmp_path / "base", "llama", **wide)
    (tmp_path / "nf4").mkdir()
    quantize(tmp_path / "base", tmp_path / "nf4", double_quant=double_quant)
    _, shape = read_model(tmp_path / "base")
    stored = 0
    for file in (tmp_path / "nf4").glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            # The maps and the JSON of a quant_state are the same few bytes for every Linear.
            stored += sum(
                tensors.get_tensor(key).nbytes
                for key in tensors.keys()  # noqa: SIM118
                if "quant_map" not in key and "quant_state" not in key
            )
    predicted = weights_bytes(shape, "qlora", double_quant)
    assert stored == pytest.approx(predicted, rel=1e-3)
    bits = NF4_BYTES[double_quant] * 8
    assert bits == pytest.approx(4.127 if double_quant else 4.5, abs=1e-3)


def bytes_kept(model, compute):
    """Bytes of what autograd keeps of `compute()`, parameters left out, each storage once."""
    skipped = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skipped:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        result = compute()
    assert result is not None
    return sum(size for size, _ in kept.values())


def bytes_of_layer(model, layer, hidden):
    stream = torch.randn(1, TOKENS, hidden, dtype=torch.bfloat16, requires_grad=True)
    cos, sin = model.get_base_model().model.rotary_emb(stream, torch.arange(TOKENS)[None])
    shared = cos.nbytes + sin.nbytes
    options = {"position_embeddings": (cos, sin), "attention_mask": None}
    return bytes_kept(model, lambda: layer(stream, **options)) - shared


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fused_lora": True},
        {"targets": ["q_proj", "v_proj"]},
        {"targets": ["q_proj", "v_proj"], "fused_lora": True},
        {"targets": ["gate_proj", "up_proj", "down_proj"]},
        {"rank": 64},
        {"rank": 64, "fused_lora": True},
    ],
    ids=str,
)
def test_a_layer_keeps_the_bytes_that_the_model_says(tmp_path, changes):
    wide = {"hidden_size": 128, "intermediate_size": 320, "head_dim": 32, "num_hidden_layers": 1}
    # Without shared heads: for those the CPU takes a kernel that keeps the attention matrix.
    make_model(tmp_path, "llama", **wide, num_key_value_heads=4)
    _, shape = read_model(tmp_path)
    targets = changes.pop("targets", "all-linear")
    run = run_of(shape, **changes, targets=match_targets(shape, targets))
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model = get_peft_model(
        base, LoraConfig(r=run.rank, target_modules=targets, task_type="CAUSAL_LM")
    ).train()
    if run.fused_lora:
        fuse_lora(model, liger=False, placement=Placement(1, 1))
    # Autocast's bf16 copies of the adapter are counted apart (`casts` in placement.moments).
    casts = 0 if run.fused_lora else 2 * adapter_parameters(shape, run.rank, run.targets)
    kept = bytes_of_layer(model, base.model.layers[0], shape.hidden) - casts
    per_token = attention_saved(shape, run) + mlp_saved(shape, run)
    assert kept / TOKENS == pytest.approx(per_token, rel=0.03)


@pytest.mark.parametrize("arch", ["qwen3", "olmo2", "glm4", "phi3", "granite", "hunyuan_v1_dense"])
def test_norms_and_fused_projections_are_counted(arch):
    """Norms of q and k, norms of results, and q, k and v as views of one tensor."""
    widths = {"hidden_size": 128, "intermediate_size": 320, "head_dim": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    config = AutoConfig.for_model(arch, vocab_size=260, pad_token_id=0, **widths, **heads)
    shape = shape_of(config)
    run = run_of(shape)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lora = LoraConfig(r=8, target_modules=sorted(run.targets), task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).train()
    casts = 2 * adapter_parameters(shape, run.rank, run.targets)
    kept = bytes_of_layer(model, base.model.layers[0], shape.hidden) - casts
    per_token = attention_saved(shape, run) + mlp_saved(shape, run)
    assert kept / TOKENS == pytest.approx(per_token, rel=0.01)


class Float32(TorchFunctionMode):
    """Autocast of a GPU, which computes norms and powers in float32; that of a CPU does not."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in FLOAT32:
            args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs))
        return function(*args, **(kwargs or {}))


def bytes_of_whole_layer(model, base):
    """Bytes a token of what the only layer keeps, without the scores of attention."""
    layer = next(x for x in base.modules() if isinstance(x, torch.nn.ModuleList))[0]
    skipped = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, forward = {}, layer.forward

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skipped and sum(n % PRIME == 0 for n in tensor.shape) < 2:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    def counted(stream, *args, **kwargs):
        # Cosines and masks are shared by all layers.
        shared = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        skipped.update(x.untyped_storage().data_ptr() for x in shared)
        stream = stream.detach().to(torch.bfloat16).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), Float32():
            return forward(stream, *args, **kwargs)

    layer.forward = counted
    with torch.autocast("cpu", torch.bfloat16):
        base(input_ids=torch.arange(PRIME)[None], use_cache=False)
    return sum(size for size, _ in kept.values()) / PRIME


GPT = {"n_embd": 128, "n_head": 4, "n_layer": 1}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("arch", "more"),
    [
        # The output projection reads a copy where a part of q is rotated.
        ("glm", {}),
        ("stablelm", {}),
        ("phi", {}),
        # Its dense layer.
        ("glm4_moe", {"first_k_dense_replace": 1}),
        # LayerNorm, whose float32 each projection casts.
        ("starcoder2", {}),
        ("starcoder2", {"residual_dropout": 0.1}),
        ("nemotron", {}),
        # Its MLP's dropout makes several operations of it.
        ("seed_oss", {"attention_dropout": 0.0}),
        # Activations without a gate, of other names than most, or with a gate unlike SwiGLU.
        ("arcee", {}),
        ("apertus", {}),
        ("bloom", {"n_head": 4, "n_layer": 1}),
        ("mpt", {"d_model": 128, "n_heads": 4, "n_layers": 1}),
        ("opt", {"ffn_dim": 512, "word_embed_proj_dim": 128, "dropout": 0.0}),
        ("bitnet", {}),
        # Norms of q and k in float32, without weights, or of what attention returns.
        ("persimmon", {}),
        ("nanochat", {}),
        ("diffllama", {}),
        # Projections of the same name in both halves, and one input of both.
        ("gpt_bigcode", GPT | {"multi_query": False, "resid_pdrop": 0.0, "attn_pdrop": 0.0}),
        ("cohere", {}),
        ("ernie4_5", {}),
    ],
)
def test_layers_that_liger_does_not_know_are_counted(arch, more, fused):
    widths = {"hidden_size": 128, "intermediate_size": 512, "head_dim": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    config = AutoConfig.for_model(arch, vocab_size=260, pad_token_id=0, **widths, **heads, **more)
    shape = shape_of(config)
    # On a GPU: Liger is there, but changes nothing.
    run = run_of(shape, fused_lora=fused, liger=True)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lora = LoraConfig(r=8, target_modules=sorted(run.targets), task_type="CAUSAL_LM")
    with targets_as_written():
        model = get_peft_model(base, lora).train()
    if fused:
        fuse_lora(model, liger=False, placement=Placement(1, 1))
    kept = bytes_of_whole_layer(model, base)
    if not fused:
        kept -= 2 * adapter_parameters(shape, run.rank, run.targets) / PRIME
    if shape.drops:
        # The mask of a CPU has the values' type, that of a GPU a byte.
        kept -= 2 * shape.hidden
    per_token = attention_saved(shape, run) + mlp_saved(shape, run)
    assert kept == pytest.approx(per_token, rel=0.01)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("arch", ["gemma", "arcee", "nanochat", "bitnet"])
def test_the_peak_of_an_activations_backward_pass_is_counted(arch, fused):
    widths = {"hidden_size": 64, "intermediate_size": 2048, "head_dim": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    config = AutoConfig.for_model(arch, vocab_size=260, pad_token_id=0, **widths, **heads)
    shape = shape_of(config)
    run = run_of(shape, fused_lora=fused)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lora = LoraConfig(r=8, target_modules=sorted(run.targets), task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).train()
    if fused:
        fuse_lora(model, liger=False, placement=Placement(1, 1))
    x, dy = (torch.randn(1, TOKENS, 64, dtype=torch.bfloat16) for _ in range(2))
    x.requires_grad_()
    alive = Alive(x, dy, *model.parameters(), *model.buffers())
    with torch.autocast("cpu", torch.bfloat16), Float32(), alive:
        base.model.layers[0].mlp(x).backward(dy)
    saved = TOKENS * (mlp_saved(shape, run) - norm_saved(64, shape, run))
    # Copies of the adapter are counted apart.
    casts = 0 if fused else 2 * sum(x.numel() for n, x in model.named_parameters() if "lora_" in n)
    found = alive.most + x.nbytes + dy.nbytes - casts
    assert found == pytest.approx(saved + mlp_working(shape, run), rel=0.02)


def test_the_families_that_liger_knows_are_listed():
    installed = importlib.util.find_spec("liger_kernel")
    if installed is None:
        pytest.skip("Liger is not installed")
    # Its source, since only Triton can import it.
    patch = Path(installed.origin).parent / "transformers" / "monkey_patch.py"
    tree, known = ast.parse(patch.read_text(encoding="utf-8")), {}
    with_norms = {
        each.name
        for each in tree.body
        if isinstance(each, ast.FunctionDef) and "rms_norm" in [x.arg for x in each.args.args]
    }
    for each in tree.body:
        if ast.unparse(each).startswith("MODEL_TYPE_TO_APPLY_LIGER_FN = "):
            known = {k.value: v.id for k, v in zip(each.value.keys, each.value.values, strict=True)}
    families = {family for family, apply in known.items() if apply in with_norms}
    assert families & MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() == LIGER


@pytest.mark.parametrize(("family", "each"), [("qwen3_moe", 6), ("gpt_oss", 12)])
def test_what_an_experts_activation_keeps_is_counted(family, each):
    shape = shape_of(moe_config(family))
    assert shape.gate_bytes == each * shape.expert_width
    assert shape.sinks == (family == "gpt_oss")


def with_packed_experts(config, experts):
    """A PEFT model with an adapter, if `experts` on experts too."""
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, tensor in expert_tensors(base).items():
        put_packed(base, name, random_experts(tuple(tensor.shape), 1, True, base.device))
    compute_packed(base)
    lora = LoraConfig(
        r=8,
        target_modules=["q_proj"],
        target_parameters=target_parameters(base) if experts else None,
    )
    with stand_ins(base):
        model = get_peft_model(base, lora).train()
    use_factors(model)
    return model


@pytest.mark.parametrize("experts", [False, True])
def test_what_an_expert_of_a_token_keeps_is_counted(experts):
    """Its values between the products, the order of rows, and what an adapter reads."""
    kept, said = [], []
    for chosen in (2, 4):
        widths = {"hidden_size": 128, "head_dim": 32, "num_hidden_layers": 1}
        widths |= {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 64}
        config = AutoConfig.for_model(
            "mixtral",
            vocab_size=260,
            pad_token_id=0,
            num_local_experts=8,
            num_experts_per_tok=chosen,
            **widths,
        )
        shape = shape_of(config)
        model = with_packed_experts(config, experts)
        layer = model.get_base_model().model.layers[0]
        kept.append(bytes_of_layer(model, layer, shape.hidden))
        said.append(mlp_saved(shape, run_of(shape, method="qlora", experts=experts)))
    assert (kept[1] - kept[0]) / TOKENS == pytest.approx(said[1] - said[0], rel=0.01)


class Alive(TorchDispatchMode):
    """The most bytes, at any time, of the tensors that operations made."""

    def __init__(self, *known):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.now, self.most = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.change(storage.nbytes())
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        return result

    def change(self, size):
        self.now += size
        self.most = max(self.most, self.now)

    def forget(self, key, size):
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize(
    ("family", "hidden", "width", "tokens"),
    [
        # The peak is in the weighted sum, the activation, the second product, the first one.
        ("qwen3_moe", 256, 64, 256),
        ("qwen3_moe", 64, 512, 512),
        ("qwen3_moe", 64, 512, 136),
        ("qwen3_moe", 64, 512, 16),
        ("gpt_oss", 64, 256, 1024),
        ("gpt_oss", 128, 256, 16),
    ],
)
def test_the_peak_of_the_experts_backward_pass_is_counted(family, hidden, width, tokens, experts):
    widths = {"hidden_size": hidden, "head_dim": 32, "num_hidden_layers": 1}
    widths |= {"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts_per_tok": 8}
    widths |= {"intermediate_size": width, "moe_intermediate_size": width}
    widths |= {"num_experts": 32, "num_local_experts": 32}
    config = AutoConfig.for_model(family, vocab_size=260, pad_token_id=0, **widths)
    shape = shape_of(config)
    model = with_packed_experts(config, experts)
    mlp = model.get_base_model().model.layers[0].mlp
    x, dy = (torch.randn(1, tokens, hidden, dtype=torch.bfloat16) for _ in range(2))
    x.requires_grad_()
    alive = Alive(x, dy, *model.parameters(), *model.buffers())
    with torch.autocast("cpu", torch.bfloat16), alive:
        result = mlp(x)
        # The result stays as long as the gradient of the residual stream would.
        (result[0] if isinstance(result, tuple) else result).backward(dy)
    run = run_of(shape, method="qlora", tokens=tokens, experts=experts)
    saved = tokens * (mlp_saved(shape, run) - norm_saved(hidden, shape, run))
    assert alive.most == pytest.approx(saved + mlp_working(shape, run), rel=0.02)


class CopiedSwiglu(torch.autograd.Function):
    """What Liger's makes: contiguous copies of its inputs, later overwritten by their gradients."""

    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.saved_tensors


@pytest.mark.parametrize("fused", [True, False])
def test_gate_and_up_that_liger_copies_out_of_one_tensor_are_counted(fused):
    tokens, widths = 1024, {"hidden_size": 64, "intermediate_size": 1024, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    config = AutoConfig.for_model("phi3", vocab_size=260, pad_token_id=0, **widths, **heads)
    shape = shape_of(config)
    run = run_of(shape, tokens=tokens, liger=True, fused_lora=fused)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lora = LoraConfig(r=8, target_modules=sorted(run.targets), task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).train()
    if fused:
        fuse_lora(model, liger=False, placement=Placement(1, 1))
    mlp = base.model.layers[0].mlp

    def forward(x):
        # As in LigerPhi3SwiGLUMLP, whose kernels need a GPU.
        gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
        return mlp.down_proj(CopiedSwiglu.apply(gate, up))

    x, dy = (torch.randn(1, tokens, 64, dtype=torch.bfloat16) for _ in range(2))
    x.requires_grad_()
    alive = Alive(x, dy, *model.parameters(), *model.buffers())
    with torch.autocast("cpu", torch.bfloat16), alive:
        forward(x).backward(dy)
    saved = tokens * (mlp_saved(shape, run) - norm_saved(64, shape, run))
    found = alive.most + x.nbytes + dy.nbytes
    assert found == pytest.approx(saved + mlp_working(shape, run), rel=0.02)


@pytest.mark.parametrize(
    ("arch", "fused", "streams"), [("llama", True, 2), ("gemma", True, 1), ("llama", False, 1)]
)
def test_checkpointing_keeps_the_inputs_that_the_model_says(tmp_path, arch, fused, streams):
    kept = {}
    for layers in (1, 3):
        folder = tmp_path / f"{layers}"
        make_model(folder, arch, num_hidden_layers=layers)
        _, shape = read_model(folder)
        assert in_halves(shape, run_of(shape, fused_lora=fused)) == (streams == 2)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(base, config).train()
        if fused:
            fuse_lora(model, liger=False, placement=Placement())
        else:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        ids = torch.arange(TOKENS)[None]
        kept[layers] = bytes_kept(model, lambda run=base.model, ids=ids: run(input_ids=ids)[0])
    per_layer = (kept[3] - kept[1]) / 2 / TOKENS
    assert per_layer == pytest.approx(streams * 2 * shape.hidden, rel=0.02)


class _KeepsItsInput(torch.autograd.Function):
    """A norm as Liger's: its input is all that it saves for each value."""

    @staticmethod
    def forward(ctx, x, weight):
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True)).to(x.dtype)
        ctx.save_for_backward(x, scale)
        return x * scale * weight


def test_the_first_layers_input_is_kept_only_if_something_is_recomputed(tmp_path, monkeypatch):
    norm = modeling_llama.LlamaRMSNorm
    monkeypatch.setattr(norm, "forward", lambda self, x: _KeepsItsInput.apply(x, self.weight))
    make_model(tmp_path, "llama", num_hidden_layers=3)
    kept = []
    for count in (1, 2, 3):
        base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(base, config).train()
        fuse_lora(model, liger=False, placement=Placement(3, count))
        with Alive(*model.parameters(), *model.buffers()) as alive:
            result = base.model(input_ids=torch.arange(TOKENS)[None])[0]
            kept.append(alive.now)
    shape = shape_of(base.config)
    run = run_of(shape, fused_lora=True, liger=True)
    one_more, all_of_them = kept[1] - kept[0], kept[2] - kept[1]
    assert result.requires_grad
    assert one_more - all_of_them == pytest.approx(sizes_of(shape, run).embedded, rel=0.15)


LLAMA_7B = Shape(
    layers=32,
    vocabulary=32000,
    hidden=4096,
    intermediate=11008,
    heads=32,
    kv_heads=32,
    head_dim=128,
    swiglu=True,
    plain=True,
    linears=tuple(
        Linear(f"model.layers.{layer}.{name}", *size)
        for layer in range(32)
        for name, size in {
            "self_attn.q_proj": (4096, 4096),
            "self_attn.k_proj": (4096, 4096),
            "self_attn.v_proj": (4096, 4096),
            "self_attn.o_proj": (4096, 4096),
            "mlp.gate_proj": (4096, 11008),
            "mlp.up_proj": (4096, 11008),
            "mlp.down_proj": (11008, 4096),
        }.items()
    ),
    other_parameters=2 * 32000 * 4096 + 65 * 4096,
)


def test_llama_2_7b_has_its_published_size():
    assert LLAMA_7B.parameters == 6_738_415_616


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"checkpointing": True}, {}),
        ({"checkpointing": True, "offloading": True}, {"checkpointing": True}),
        ({"method": "qlora"}, {"method": "lora"}),
        ({"method": "lora", "checkpointing": True}, {"method": "full", "checkpointing": True}),
        ({"optimizer": "paged_adamw_8bit"}, {"optimizer": "paged_adamw_32bit"}),
        ({"liger": True}, {"liger": False}),
        ({"fused_lora": True}, {"fused_lora": False}),
        ({}, {"dropout": 0.1}),
        ({"rank": 8}, {"rank": 64}),
        ({"tokens": 2048, "learned_tokens": 2048}, {"tokens": 8192, "learned_tokens": 8192}),
        ({}, {"attention": "sdpa"}),
        ({"attention": "sdpa"}, {"attention": "eager"}),
        ({"method": "qlora", "double_quant": True}, {"method": "qlora", "double_quant": False}),
    ],
    ids=str,
)
def test_a_saving_saves(less, more):
    base = run_of(LLAMA_7B, tokens=4096, learned_tokens=4096, liger=True)
    assert placement.predict_run(LLAMA_7B, replace(base, **less)).device < (
        placement.predict_run(LLAMA_7B, replace(base, **more)).device
    )


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_the_parts_are_the_whole(method):
    found = placement.predict_run(LLAMA_7B, run_of(LLAMA_7B, method=method))
    parts = ("weights", "adapter", "optimizer", "activations", "logits", "overhead")
    assert sum(getattr(found, part) for part in parts) == found.device
    assert found.device - found.peak == pytest.approx(found.reserve)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_random_nf4_model_is_as_large_as_predicted_and_computes(double_quant):
    model = build("tiny", True, torch.device("cpu"), double_quant=double_quant)
    linears = [m for m in model.modules() if isinstance(m, Linear4bit)]
    shape = shape_of(config_of("tiny"))
    assert len(linears) == len(shape.linears) == 14
    states = [linear.weight.quant_state for linear in linears]
    constants = sum(s.absmax.nbytes + (s.state2.absmax.nbytes if s.nested else 0) for s in states)
    found = constants + sum(p.nbytes for p in model.parameters())
    # A part of a block of 256 constants takes a whole one: at most 4 bytes a Linear.
    assert found - weights_bytes(shape, "qlora", double_quant) <= 4 * len(linears)
    assert model(torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.parametrize(
    "point",
    [
        Point("tiny", "qlora", 4, 64),
        Point("tiny-tied", "lora", 4, 64, dropout=0.1, accumulation=2),
        Point("tiny-gemma3", "qlora", 4, 64),
        Point("tiny-moe", "qlora", 4, 64, targets=ATTENTION),
        Point("tiny-moe", "lora", 4, 64, targets=ATTENTION),
        Point("tiny-oss", "qlora", 4, 64, targets=ATTENTION),
        Point("tiny-phi3", "qlora", 4, 64),
        Point("tiny-starcoder2", "qlora", 4, 64),
        Point("tiny", "full", 0, 64, checkpointing=False),
    ],
    ids=lambda point: f"{point.shape} {point.method}",
)
def test_a_point_of_the_benchmark_trains_and_has_a_prediction(point):
    trainer, fast, placed = prepare(point, torch.device("cpu"), random_rows(point, 2))
    assert trainer.train().global_step == 2
    shape, run = training_of(point, asdict(fast) | {"offload": placed.offload})
    assert run.tokens == 64
    assert placement.predict_run(shape, run).peak > weights_bytes(shape, point.method, True)


def test_one_long_row_needs_more_for_attention_than_many_short_ones(folders):
    """Deterministic attention sums the gradient of the queries once for each share of the keys."""
    _, shape = read_model(folders["llama"])
    many, one = (attention_working(shape, run_of(shape, sequences=n, tokens=4096)) for n in (64, 1))
    width = shape.heads * shape.head_dim
    # 4 heads of one row leave a GPU of 132 multiprocessors 33 shares.
    assert one - many == 4096 * 4 * width * (33 - 1)


class Kernel(torch.autograd.Function):
    """Allocates what activations.py says of FlashAttention 2."""

    @staticmethod
    def forward(ctx, q, k, v):
        out, sums = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, _, sums = ctx.saved_tensors
        copies = -(-activations.MULTIPROCESSORS // q.shape[1])
        grouped = q.shape[1] != k.shape[1]
        # Until the end.
        _kept = [q.new_empty((copies, *q.shape), dtype=torch.float32), torch.empty_like(sums)]
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        _kept += [q.new_empty(len(k), *q.shape[1:]) for _ in range(2 * grouped)]
        return tuple(gradients)


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_the_peak_of_attention_in_parts_is_counted(monkeypatch, heads, parts):
    for module in (attention, activations):
        monkeypatch.setattr(module, "QUERIES", 16)
    monkeypatch.setattr(attention, "varlen_attn", lambda q, k, v, *_, **__: Kernel.apply(q, k, v))
    tokens, size = 16 * parts, 8
    given = [torch.zeros(1, n, tokens, size, dtype=torch.bfloat16) for n in (4, heads, heads)]
    dy = torch.zeros(1, tokens, 4, size, dtype=torch.bfloat16)

    class Projection(torch.autograd.Function):
        """Saves its input until its backward pass has ended."""

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return dy[0, 0, 0, :1]

        @staticmethod
        def backward(ctx, _):
            assert ctx.saved_tensors
            return dy

    with Alive(*given, dy) as alive:
        leaves = [x.detach().requires_grad_() for x in given]
        Projection.apply(attention.varlen_attention(None, *leaves, None)[0]).sum().backward()
    run = SimpleNamespace(tokens=tokens, rows=1, sequences=1, attention="varlen", packed=False)
    shape = SimpleNamespace(hidden=0, heads=4, head_dim=size, kv_heads=heads)
    a = 4 * size
    # Two outputs and the log-sum-exp; q, k, v and the output's gradient were there before.
    expected = tokens * (4 * a + 4 * 4 - 2 * a) + activations.attention_working(shape, run)
    # The sums that belong to log-sum-exp are those of a part.
    assert expected - 4 * 4 * tokens - 64 <= alive.most <= expected
