"""Chooses what a run uses beyond plain PyTorch, for `train` and for the prediction of `plan`.

Depends on the hardware, the parameters and the model family. Imports no kernels, so that the choice
can be made on any machine.
"""

from dataclasses import dataclass

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from stages.shared.params import Params, Train
from stages.shared.process import StageError

# The attention of stages/training/attention.py.
VARLEN = "varlen"
MLP_PARTS = ("gate", "up", "down")
# Families tested not to attend across the rows of a flattened batch, with this attention or with a
# mask (tests/test_attention.py; transformers 5.23). Others ignore the bounds of rows, have their
# own attention code (without any mask under varlen), or carry a state from token to token.
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
# Families tested only with a mask: varlen would mix their rows or does not support their head
# sizes, or they have attention dropout in their config.
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
# Families for which Liger has norms and more (tests/test_vram.py asks Liger 0.8.5).
LIGER = {
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v4",
    "exaone4",
    "falcon_h1",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gemma4",
    "gemma4_text",
    "glm4",
    "gpt_oss",
    "granite",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "llama",
    "llama4",
    "llama4_text",
    "ministral",
    "mistral",
    "mixtral",
    "mllama",
    "olmo2",
    "olmo3",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "smollm3",
}
# Families whose layers are just residual attention and a residual MLP, each after its norm.
PLAIN_LAYERS = {f"{name}DecoderLayer" for name in ("Llama", "Mistral", "Qwen2", "Qwen3")}


@dataclass(frozen=True)
class FastPath:
    """`attention` is varlen, sdpa or eager. `padding_free` concatenates the rows of a batch,
    `liger` uses Liger's kernels, `fused_lora` the products of training/fused_lora.py, and
    `flash_attention_4` computes varlen attention (training/attention.py)."""

    attention: str
    padding_free: bool
    liger: bool
    fused_lora: bool
    flash_attention_4: bool = False

    def __str__(self) -> str:
        used = [name.replace("_", " ") for name, on in vars(self).items() if on is True]
        return ", ".join([f"{self.attention} attention", *used])


def choose_fast_path(params: Params, config: PretrainedConfig, gpu: bool) -> FastPath:
    """The fast path of training on an NVIDIA GPU (`gpu`) or on a CPU.

    Raises StageError if the model cannot be trained with `params.train`.
    """
    attention = choose_attention(params.train, config, gpu)
    return FastPath(
        attention=attention,
        padding_free=attention == VARLEN,
        liger=gpu,
        fused_lora=gpu and params.lora.dropout == 0,
    )


def step_tokens(train: Train, row_tokens: list[int], max_length: int) -> int:
    """Tokens of a forward pass with rows of maximum length, or full packs."""
    return train.batch_size * (max_length if train.batching == "packing" else max(row_tokens))


def choose_attention(train: Train, config: PretrainedConfig, gpu: bool) -> str:
    """`auto`: varlen on a GPU if supported, else transformers' choice. Refuses what cannot run."""
    kind, family = train.attention, config.model_type
    varlen = supports_varlen(config)
    # Some families cap the logits of their attention, and some predate SDPA.
    # transformers types this mapping's values as pairs.
    sdpa = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa  # type: ignore[attr-defined]
    if not {VARLEN: varlen, "sdpa": sdpa}.get(kind, True):
        raise StageError(f"train.attention: {kind} does not support {family}; set auto")
    if kind == VARLEN and not gpu:
        raise StageError(f"train.attention: {kind} needs a GPU; set auto")
    if train.batching == "packing" and family not in FLATTENED | MASKED:
        raise StageError(
            f"train.batching: {family} is not known to keep packed rows apart; set group_by_length"
        )
    if kind != "auto":
        return kind
    if gpu and varlen:
        return VARLEN
    return "sdpa" if sdpa else "eager"


def supports_varlen(config: PretrainedConfig) -> bool:
    """Whether varlen attention supports the model (it has no soft cap)."""
    capped = getattr(config, "attn_logit_softcapping", None)
    return config.model_type in FLATTENED and capped is None


def is_swiglu(mlp: torch.nn.Module) -> bool:
    """Whether fused training computes `mlp` in one operation, if all its Linears have adapters.

    False for families that do more in between, under the same names.
    """
    children = dict(mlp.named_children())
    if any(f"{name}_proj" not in children for name in MLP_PARTS):
        return False
    code, known = (kind.forward.__code__ for kind in (type(mlp), LlamaMLP))
    same = (code.co_code, code.co_names) == (known.co_code, known.co_names)
    return same and type(children.get("act_fn")).__name__.startswith("SiLU")


def plain_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers of `model` that fused training checkpoints in two halves, in order."""
    return [module for module in model.modules() if type(module).__name__ in PLAIN_LAYERS]
