"""Models of well-known shapes with random weights, made on the device as 16 bit or as NF4.

An NF4 model is built from random 4-bit codes, so that a 70B shape never exists in 16 bit. Training
it takes the time and memory of the real one, but the results are meaningless.
"""

import functools
import importlib
import json
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from bitsandbytes.functional import create_dynamic_map, get_4bit_type, quantize_4bit
from bitsandbytes.nn import Params4bit
from safetensors.torch import save_file
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from stages.shared.experts import expert_tensors
from stages.shared.model import set_compute_dtype
from stages.shared.outputs import write_sums
from stages.shared.packed import compute_packed, put_packed
from stages.shared.packed_model import linear4bit
from stages.shared.packed_storages import Nf4Experts
from stages.shared.process import sha256

SPREAD = 0.02
# The modelling modules of transformers before Liger replaced classes in them.
_UNTOUCHED: dict[str, dict] = {}
# Files of a 16-bit model are written and hashed in parallel.
SHARDS = 8


@dataclass(frozen=True)
class Family:
    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    head: int | None = None
    window: int | None = None
    more: dict = field(default_factory=dict)


A3B = {
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}
TINY_A3B = A3B | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
OSS = {"num_local_experts": 32, "num_experts_per_tok": 4}
TINY_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2}

SHAPES = {
    "tiny": Family("llama", 64, 128, 2, 4, 2, 260, False),
    "tiny-tied": Family("qwen2", 64, 128, 2, 4, 2, 260, True),
    "tiny-gemma3": Family("gemma3_text", 64, 128, 2, 4, 2, 260, True, 16, 16),
    "small": Family("llama", 1024, 1024, 4, 16, 4, 32000, False),
    "llama-3.2-1b": Family("llama", 2048, 8192, 16, 32, 8, 128256, True),
    "qwen2-1.5b": Family("qwen2", 1536, 8960, 28, 12, 2, 151936, True),
    "mistral-7b": Family("mistral", 4096, 14336, 32, 32, 8, 32000, False),
    "llama-2-7b": Family("llama", 4096, 11008, 32, 32, 32, 32000, False),
    "llama-2-13b": Family("llama", 5120, 13824, 40, 40, 40, 32000, False),
    "qwen2.5-7b": Family("qwen2", 3584, 18944, 28, 28, 4, 152064, False),
    "llama-3-8b": Family("llama", 4096, 14336, 32, 32, 8, 128256, False),
    "qwen1.5-110b": Family("qwen2", 8192, 49152, 80, 64, 8, 152064, False),
    # The language model of the multimodal checkpoint.
    "gemma-3-12b": Family("gemma3_text", 3840, 15360, 48, 16, 8, 262208, True, 256, 1024),
    "tiny-moe": Family("qwen3_moe", 64, 128, 2, 4, 2, 260, False, 16, more=TINY_A3B),
    # Families that are not computed in halves: one Linear for q, k and v; an MLP without a gate.
    "tiny-phi3": Family("phi3", 64, 128, 2, 4, 4, 260, False),
    "tiny-starcoder2": Family("starcoder2", 64, 256, 2, 4, 2, 260, True),
    "phi-3-mini": Family("phi3", 3072, 8192, 32, 32, 32, 32064, False),
    "starcoder2-7b": Family("starcoder2", 4608, 18432, 32, 36, 4, 49152, False),
    "tiny-oss": Family("gpt_oss", 64, 64, 2, 4, 2, 260, False, 16, 16, more=TINY_OSS),
    "qwen-3-30b-a3b": Family("qwen3_moe", 2048, 6144, 48, 32, 4, 151936, False, 128, more=A3B),
    "gpt-oss-20b": Family("gpt_oss", 2880, 2880, 24, 64, 8, 201088, False, 64, 128, more=OSS),
    "llama-2-70b-8-layers": Family("llama", 8192, 28672, 8, 64, 8, 32000, False),
    "llama-2-70b": Family("llama", 8192, 28672, 80, 64, 8, 32000, False),
}


def config_of(name: str) -> PretrainedConfig:
    """The configuration of a shape of SHAPES."""
    shape = SHAPES[name]
    more: dict = {"head_dim": shape.head} if shape.head else {}
    if shape.window or shape.model_type == "mistral":
        more["sliding_window"] = shape.window
    more |= shape.more
    return AutoConfig.for_model(
        shape.model_type,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=262144,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        **more,
    )


@functools.cache
def _some_codes(device: torch.device) -> torch.Tensor:
    """Pairs of codes of normally distributed weights, uint8 [n]. Equally frequent codes have a mean
    that is not 0: every token then ends near the same direction, on one of its two sides, and small
    differences decide which."""
    values = torch.randn(2**22, generator=torch.Generator().manual_seed(0))
    return quantize_4bit(values, blocksize=64, quant_type="nf4")[0].flatten().to(device)


def _codes(count: int, device: torch.device) -> torch.Tensor:
    some = _some_codes(device)
    drawn = torch.randint(0, len(some), (count // 2,), dtype=torch.int32, device=device)
    return some[drawn][:, None]


_host_codes = functools.cache(functools.partial(_codes, device=torch.device("cpu")))


def random_nf4(outputs: int, inputs: int, double_quant: bool, device: torch.device) -> Params4bit:
    """A weight [outputs, inputs] of random NF4 codes, in [-SPREAD, SPREAD].

    In host memory all weights of the same size share their codes, so that a 70B shape is built at
    once.
    """
    count = outputs * inputs
    codes = _host_codes(count) if device.type == "cpu" else _codes(count, device)
    stats = {
        "quant_type": "nf4",
        "blocksize": 64,
        "quant_map": get_4bit_type("nf4", device=device),
        "dtype": "bfloat16",
        "shape": (outputs, inputs),
    }
    blocks = count // 64
    if double_quant:
        # Constants of zero: every block then has the offset for its constant.
        stats |= {
            "absmax": torch.zeros(blocks, dtype=torch.uint8, device=device),
            "nested_absmax": torch.zeros(-(-blocks // 256), device=device),
            "nested_blocksize": 256,
            "nested_quant_map": create_dynamic_map().to(device),
            "nested_dtype": "float32",
            "nested_offset": SPREAD,
        }
    else:
        stats["absmax"] = torch.full((blocks,), SPREAD, device=device)
    return Params4bit.from_prequantized(codes, stats, device=device)


def random_experts(
    shape: tuple[int, ...], pieces: int, double_quant: bool, device: torch.device
) -> Nf4Experts:
    """Experts [E, a, b] as random_nf4 makes a weight, each of so many tensors of a checkpoint."""
    experts, rows, columns = shape
    dims, blocks = (experts, pieces), rows * columns // pieces // 64
    codes = random_nf4(experts * rows, columns, double_quant, device).data
    codes = codes.view(*dims, rows // pieces, columns // 2)
    if not double_quant:
        return Nf4Experts(codes, torch.full((*dims, blocks), SPREAD, device=device))
    return Nf4Experts(
        codes,
        torch.zeros(*dims, blocks, dtype=torch.uint8, device=device),
        torch.zeros(*dims, -(-blocks // 256), device=device),
        torch.full(dims, SPREAD, device=device),
    )


def build(
    name: str,
    quantized: bool,
    device: torch.device,
    attention: str | None = None,
    double_quant: bool = True,
) -> PreTrainedModel:
    """A frozen base like that of `load_base`: norms 1, the rest random, bf16 or NF4.

    Undoes Liger's changes to the modules of its family first, since otherwise a second model of a
    process would have Liger's MLPs, which the fused path does not support.
    """
    config = config_of(name)
    family = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__module__
    modules = vars(importlib.import_module(family))
    modules.update(_UNTOUCHED.setdefault(family, dict(modules)))
    model = _on_meta(config, attention)
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if quantized and type(module) is torch.nn.Linear and module is not head:
            replacement = linear4bit(module)
            replacement.weight = random_nf4(
                module.out_features, module.in_features, double_quant, device
            )
            replacement.quant_state = replacement.weight.quant_state
            model.set_submodule(path, replacement)
    if quantized:
        for path, tensor in expert_tensors(model).items():
            pieces = 2 if "gate_up" in path else 1
            shape = tuple(tensor.shape)
            put_packed(model, path, random_experts(shape, pieces, double_quant, device))
        compute_packed(model)
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.device.type == "meta":
                value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
                value = value.fill_(1) if parameter.ndim == 1 else value.normal_(0, SPREAD)
                setattr(module, key, torch.nn.Parameter(value, requires_grad=False))
    if config.tie_word_embeddings:
        head.weight = model.get_input_embeddings().weight
    # The buffers hold frequencies, and in Gemma a scale, which the meta device would lose.
    if scale := getattr(model.get_input_embeddings(), "scalar_embed_scale", None):
        model.get_input_embeddings().embed_scale = torch.tensor(scale, device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.is_loaded_in_4bit = quantized
    set_compute_dtype(model, torch.bfloat16)
    model.config.use_cache = False
    return model.eval()


def write_base(name: str, folder: Path, device: torch.device) -> int:
    """Write a shape's random bf16 weights as fetch_model would; returns the parameters.

    `folder` may hold a tokenizer already; its SHA256SUMS is written last, over every file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(name)
    config.architectures = [type(_on_meta(config)).__name__]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    source = {"source": "local", "id": name, "revision": None, "commit": None, "files": {}}
    (folder / "source.json").write_text(json.dumps(source), encoding="utf-8")
    parameters = list(_on_meta(config).named_parameters())
    total = sum(parameter.numel() for _, parameter in parameters)
    shards, size = [[] for _ in range(SHARDS)], 0
    for key, parameter in parameters:
        shards[size * SHARDS // total].append((key, parameter.shape))
        size += parameter.numel()
    shards = [shard for shard in shards if shard]
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]

    def write(file: str, shard: list) -> tuple[str, str]:
        tensors = {}
        for key, dims in shard:
            # The weights depend neither on the GPU model nor on the order of threads.
            seeded = torch.Generator(device).manual_seed(zlib.crc32(key.encode()))
            value = torch.empty(dims, dtype=torch.bfloat16, device=device)
            value = value.fill_(1) if len(dims) == 1 else value.normal_(0, SPREAD, generator=seeded)
            tensors[key] = value.cpu()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        return file, sha256(folder / file)

    with ThreadPoolExecutor(SHARDS) as pool:
        sums = dict(pool.map(write, names, shards))
    index = {
        "metadata": {"total_size": 2 * total},
        "weight_map": {key: n for n, shard in zip(names, shards, strict=True) for key, _ in shard},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    write_sums(folder, sums)
    return total


def _on_meta(config: PretrainedConfig, attention: str | None = None) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention
        )


def tokenizer() -> PreTrainedTokenizerFast:
    """A minimal tokenizer for the trainer; rows are already token ids."""
    from tokenizers import Tokenizer, models

    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
    )


def scratch() -> Path:
    """A folder for the trainer's output."""
    return Path(tempfile.mkdtemp(prefix="benchmark-"))
