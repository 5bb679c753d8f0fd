"""What a run uses beyond plain PyTorch, decided once: `train` takes it and `plan` counts with it.

The hardware, the parameters and the family of the model decide. No kernel is imported here, so
that the choice can be made, and planned with, on any machine.
"""

from dataclasses import dataclass

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from stages.shared.params import Params, Train
from stages.shared.process import StageError

# The attention of stages/training/attention.py.
VARLEN = "varlen"
# Families seen to keep the rows of a flattened batch apart, with this attention and with a mask
# (tests/test_attention.py; transformers 5.23). Others take no notice of where a row begins, attend
# by code of their own (and with varlen without any mask), or carry a state from token to token.
FLATTENED = {
    "apertus",
    "arcee",
    "bitnet",
    "cohere",
    "cohere2",
    "cwm",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "glm",
    "glm4",
    "glm4_moe",
    "gpt_neox",
    "granite",
    "granitemoe",
    "helium",
    "hunyuan_v1_dense",
    "hyperclovax",
    "jais2",
    "llama",
    "ministral",
    "ministral3",
    "mistral",
    "mixtral",
    "nanochat",
    "olmo",
    "olmo2",
    "olmo3",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "starcoder2",
    "vaultgemma",
}
# Families seen to keep them apart with a mask alone: varlen would let them mix, its kernel does not
# have their widths, or they drop weights by a setting of their own.
MASKED = {
    "codegen",
    "deepseek_v2",
    "deepseek_v3",
    "diffllama",
    "gemma4_text",
    "gpt_bigcode",
    "gpt_neo",
    "gptj",
    "llama4_text",
    "minicpm3",
    "nemotron",
    "olmoe",
    "persimmon",
    "stablelm",
}
# Layers that are residual attention, then a residual MLP, each after its norm, and nothing more.
PLAIN_LAYERS = {f"{name}DecoderLayer" for name in ("Llama", "Mistral", "Qwen2", "Qwen3")}


@dataclass(frozen=True)
class FastPath:
    """`attention` is varlen, sdpa or eager. `padding_free` lays the rows of a batch behind each
    other, `liger` takes Liger's kernels, `fused_lora` the products of training/fused_lora.py."""

    attention: str
    padding_free: bool
    liger: bool
    fused_lora: bool

    def __str__(self) -> str:
        used = [name.replace("_", " ") for name, on in vars(self).items() if on is True]
        return ", ".join([f"{self.attention} attention", *used])


def choose_fast_path(params: Params, config: PretrainedConfig, gpu: bool) -> FastPath:
    """What training takes on an NVIDIA GPU (`gpu`) or on a CPU.

    Raises StageError when the model cannot be trained as `params.train` says.
    """
    attention = choose_attention(params.train, config, gpu)
    return FastPath(
        attention=attention,
        padding_free=attention == VARLEN,
        liger=gpu,
        fused_lora=gpu and params.lora.dropout == 0,
    )


def step_tokens(train: Train, row_tokens: list[int], max_length: int) -> int:
    """Tokens of a forward pass in which every row is the longest, or every pack is full."""
    return train.batch_size * (max_length if train.batching == "packing" else max(row_tokens))


def choose_attention(train: Train, config: PretrainedConfig, gpu: bool) -> str:
    """`auto` takes varlen on a GPU, else what transformers would; what cannot run is refused."""
    kind, family = train.attention, config.model_type
    varlen = supports_varlen(config)
    # Some families cap the logits of their attention, and some are older than it.
    # transformers types this mapping's values as pairs.
    sdpa = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa  # type: ignore[attr-defined]
    if not {VARLEN: varlen, "sdpa": sdpa}.get(kind, True):
        raise StageError(f"train.attention: {kind} does not do what {family} needs; set auto")
    if kind == VARLEN and not gpu:
        raise StageError(f"train.attention: {kind} needs a GPU; set auto")
    if train.batching == "packing" and family not in FLATTENED | MASKED:
        raise StageError(
            f"train.batching: {family} is not known to keep rows apart that lie behind each "
            "other; set group_by_length"
        )
    if kind != "auto":
        return kind
    if gpu and varlen:
        return VARLEN
    return "sdpa" if sdpa else "eager"


def supports_varlen(config: PretrainedConfig) -> bool:
    """Whether varlen attention computes all that the model asks for (it has no soft cap)."""
    capped = getattr(config, "attn_logit_softcapping", None)
    return config.model_type in FLATTENED and capped is None


def plain_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers of `model` that fused training checkpoints in two parts, in order."""
    return [module for module in model.modules() if type(module).__name__ in PLAIN_LAYERS]
