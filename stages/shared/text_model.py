"""The language model of a checkpoint, which may also contain image and audio towers.

The pipeline uses only the language model, as a causal language model of transformers. merge copies
the other towers and restores the checkpoint's tensor names. `models/quantized/names.json` maps
tensor names of the language model to those of the checkpoint, if they differ.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.integrations.heterogeneity import AmbiguousGlobalPerLayerAttributeError
from transformers.utils import logging

from stages.shared.experts import check_converter, checkpoint_part, expert_tensors, part_of
from stages.shared.multimodal import MULTIMODAL

# Language models without a causal class of their own -> a family that is equivalent without images
# (they differ only in the positions of image tokens).
_SAME = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
# Causal classes that take the configuration of the whole model.
_OF_WHOLE = {"mllama"}
_OF_IMAGES = ("type", "mrope_section", "mrope_interleaved")
# Families in which every expert computes every token; inputs of experts not chosen are zero.
_EVERY = {"llama4_text"}
# What other families call the number of experts per token.
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration of the language model in `folder`."""
    return language_config(AutoConfig.from_pretrained(folder, local_files_only=True))


def language_config(config: PretrainedConfig) -> PretrainedConfig:
    """`config`, or that of the language model if there are other towers."""
    if not is_multimodal(config) or config.model_type in _OF_WHOLE:
        return config
    text = config.get_text_config()
    if text.model_type in _SAME:
        values = text.to_dict()
        rope = values["rope_parameters"]
        values["rope_parameters"] = {k: v for k, v in rope.items() if k not in _OF_IMAGES}
        text = AutoConfig.for_model(_SAME[values.pop("model_type")], **values)
    # Only the whole config has the stored type and the settings of the head.
    text.tie_word_embeddings = config.tie_word_embeddings
    text.dtype = config.dtype or text.dtype
    return text


def is_multimodal(config: PretrainedConfig) -> bool:
    return config.model_type in MULTIMODAL


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The whole model of `config`, on the meta device."""
    auto: Any = AutoModelForImageTextToText if is_multimodal(config) else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config, dtype=torch.bfloat16)


def language_model(config: PretrainedConfig) -> PreTrainedModel:
    """Only the language model of `config`, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(language_config(config), dtype=torch.bfloat16)


def find_backbone(model: PreTrainedModel) -> None:
    """Set `model.base_model` to the part before the head, which some families name differently."""
    if model.base_model is model:
        model.base_model_prefix = "model"


def loading_report(folder: Path) -> tuple[PreTrainedModel, dict[str, set]]:
    """The whole model in `folder` on the meta device, and transformers' report of comparing it with
    the files. No tensor is read."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    auto: Any = AutoModelForImageTextToText if is_multimodal(config) else AutoModelForCausalLM
    # With it, whether packed tensors are expected depends on the machine.
    vars(config).pop("quantization_config", None)
    with without_tables():
        return auto.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )


@contextmanager
def without_tables() -> Iterator[None]:
    """Silence transformers' own report of a load, a long table."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def language_names(whole: PreTrainedModel, keys: set[str]) -> dict[str, str]:
    """Names in the language model of `keys`, tensor names in the checkpoint of `whole`.

    Keys of other towers are left out, and so are tensors that loading fuses with others, except
    experts (stages/shared/experts.py). Raises StageError if experts are fused in a way that cannot
    be undone.
    """
    renamings, converters = _transforms(whole)
    by_pattern = {p: each for each in converters for p in each.source_patterns}
    state, experts = whole.state_dict(), expert_tensors(whole)
    language = language_model(whole.config) if is_multimodal(whole.config) else whole
    inner, outer = (_backbone_name(model) for model in (language, whole))
    heads = [_name_of(model, model.get_output_embeddings()) for model in (language, whole)]
    found = {}
    for key in keys:
        name, fused = rename_source_key(key, renamings, converters, whole.base_model_prefix, state)
        if name not in state or (fused and name not in experts):
            continue
        if fused:
            own, _ = rename_source_key(key, renamings, [])
            name = checkpoint_part(name, own, fused, by_pattern[fused])
        if name.startswith(f"{outer}."):
            found[key] = f"{inner}.{name.removeprefix(f'{outer}.')}"
        elif heads[1] and name.startswith(f"{heads[1]}."):
            found[key] = f"{heads[0]}.{name.removeprefix(f'{heads[1]}.')}"
    return found


def of_no_module(whole: PreTrainedModel, keys: Iterable[str]) -> set[str]:
    """Those of `keys`, tensor names in the checkpoint of `whole`, that transformers loads into none
    of its tensors. Of some it says so, others it ignores: masks that old checkpoints contain."""
    renamings, converters = _transforms(whole)
    prefix, state = whole.base_model_prefix, whole.state_dict()
    return {
        key
        for key in keys
        if rename_source_key(key, renamings, converters, prefix, state)[0] not in state
    }


def _transforms(model: PreTrainedModel) -> tuple[list[Any], list[WeightConverter]]:
    """(renamings, converters) that transformers applies to a checkpoint's tensors; a converter
    combines several."""
    transforms = get_model_conversion_mapping(model)
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    return [each for each in transforms if not isinstance(each, WeightConverter)], converters


def check_experts(model: PreTrainedModel) -> None:
    """Raise StageError if loading a checkpoint of `model` fuses experts in a way that cannot be
    undone."""
    for converter in _transforms(model)[1]:
        for tensor in expert_tensors(model):
            if any(tensor.endswith(target) for target in converter.target_patterns):
                check_converter(tensor, converter)


def kept_in_float32(model: PreTrainedModel, names: Iterable[str] | None = None) -> set[str]:
    """Names of tensors, of all in `model` or of `names`, that transformers keeps in float32 for any
    dtype of the model. A router's bias is one: rounded, it would choose other experts."""
    patterns = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    found = re.compile("|".join(pattern.replace("*", ".*") for pattern in patterns) or "$^")
    if names is None:
        names = (name for name, _ in (*model.named_parameters(), *model.named_buffers()))
    return {name for name in names if found.search(name)}


def _backbone_name(model: PreTrainedModel) -> str:
    """The module that contains the token embeddings and the layers."""
    return _name_of(model, model.get_input_embeddings()).rpartition(".")[0]


def _name_of(model: torch.nn.Module, wanted: torch.nn.Module | None) -> str:
    return next((name for name, module in model.named_modules() if module is wanted), "")


def key_mapping(renamed: dict[str, str]) -> dict[str, str]:
    """For from_pretrained: patterns of names in the checkpoint -> replacements in the language
    model. `renamed`: name in the checkpoint -> name in the language model; experts follow the names
    around them."""
    found = {}
    for key, name in renamed.items():
        if part_of(name):
            continue
        inner, outer = name.split("."), key.split(".")
        while inner and outer and inner[-1] == outer[-1]:
            inner.pop()
            outer.pop()
        if inner or outer:
            pattern = "".join(f"{re.escape(part)}\\." for part in outer)
            found[f"^{pattern}"] = "".join(f"{part}." for part in inner)
    # The longest first, so that a replacement is not matched again.
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def chosen_experts(config: PretrainedConfig) -> int:
    """Experts that compute each token; 1 where the configuration does not say."""
    if config.model_type in _EVERY:
        return config.num_local_experts
    return next((n for key in _CHOSEN if isinstance(n := number_of(config, key), int)), 1)


def number_of(config: PretrainedConfig, key: str) -> int | None:
    """A number in the configuration, the largest if layers differ; None if it is missing or cannot
    be reduced."""
    try:
        value = getattr(config, key, None)
    except AmbiguousGlobalPerLayerAttributeError:
        return None
    return max(value) if isinstance(value, list) else value


def positions_of(config: PretrainedConfig) -> int | None:
    """Most tokens of a row that the model supports; None if its configuration does not say."""
    return number_of(config.get_text_config(), "max_position_embeddings")


def head_size(config: PretrainedConfig, model: torch.nn.Module | None = None) -> int:
    """Values of an attention head, the largest if layers differ: as `config` says, else as the
    modules of `model` do, else as is usual."""
    modules = model.modules() if model is not None else ()
    found = (getattr(module, "head_dim", None) for module in modules)
    largest = max((value for value in found if isinstance(value, int)), default=None)
    heads = number_of(config, "num_attention_heads")
    return number_of(config, "head_dim") or largest or config.hidden_size // heads
