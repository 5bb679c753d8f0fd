"""The configuration of a LoRA adapter as PEFT saves it: what it adapts, at which rank and scale.

What PEFT would do with it is read here as PEFT reads it. A setting whose effect on a merge is not
known is refused by name.
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import Field

from stages.shared.foreign import Foreign, held_to, read_object
from stages.shared.process import StageError
from stages.shared.screen import brief

CONFIG = "adapter_config.json"
# Beyond it float32 has no digits left for the weight that is added to.
LARGEST_ALPHA = 1e6
# Settings that change only how an adapter is trained or where it was made, never what it adds.
HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
READ = {
    "alpha_pattern",
    "bias",
    "init_lora_weights",
    "lora_alpha",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "target_parameters",
    "trainable_token_indices",
    "use_rslora",
}
REFUSED = {
    "megatron_config": "PEFT would import the module that megatron_core names",
    "use_dora": "DoRA rescales whole columns of the weight",
    "modules_to_save": "whole retrained modules are not a low-rank update",
    "fan_in_fan_out": "the base's weights are stored transposed",
    "lora_bias": "the adapter also changes biases",
    "layer_replication": "the base's layers are repeated",
    "alora_invocation_tokens": "activated LoRA acts on a part of the tokens only",
}
# Starts that leave the base's own weights as they are.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


Names = str | list[str] | None
Alpha = Annotated[float, Field(ge=-LARGEST_ALPHA, le=LARGEST_ALPHA)]
Rank = Annotated[int, Field(ge=1, le=2**16)]
Id = Annotated[int, Field(ge=0, lt=2**31)]


class Config(Foreign):
    """What decides which modules an adapter changes, and how much."""

    r: Rank
    lora_alpha: Alpha
    trainable_token_indices: list[Id] | dict[str, list[Id]] | None = None
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    use_rslora: bool | None = None
    target_modules: str | list[str]
    target_parameters: list[str] | None = None
    exclude_modules: Names = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: Names = None


def adapts_parameters(folder: Path) -> bool:
    """Whether the adapter in `folder` has LoRA on parameters, those of experts. False if its
    configuration cannot be read."""
    try:
        return bool(read_config(folder).target_parameters)
    except StageError:
        return False


def read_config(folder: Path) -> Config:
    path = folder / CONFIG
    try:
        config = read_object(path)
    except FileNotFoundError:
        raise StageError(f"{path} is missing; {folder} is no PEFT adapter") from None
    if config.get("peft_type") != "LORA":
        raise StageError(f"{path}: peft_type {bare(config.get('peft_type'))} is not supported")
    for key, value in sorted(config.items()):
        if key in HARMLESS or key in READ or not value:
            continue
        reason = REFUSED.get(key, "its effect on a merge is not known here")
        raise StageError(f"{path}: {bare(key)} is not supported: {reason}")
    if config.get("bias", "none") != "none":
        raise StageError(f"{path}: bias: {bare(config['bias'])} is not supported: only none")
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise StageError(
            f"{path}: init_lora_weights: {bare(start)} is not supported: it changes the "
            "base's weights; convert the adapter with PEFT's save_pretrained first"
        )
    found = held_to(Config, config, str(path))
    if not found.target_modules and not found.target_parameters:
        raise StageError(f"{path}: target_modules is empty, so the adapter changes nothing")
    return found


def indices(config: Config) -> dict[str, list[int]]:
    """Ids of the trained rows by the end of a module's name; "" is the embeddings alone."""
    wanted = config.trainable_token_indices or {}
    return {"": wanted} if isinstance(wanted, list) else wanted


def is_target(config: Config, module: str) -> bool:
    """Whether PEFT puts an update onto `module`, by its check_target_module_exists.

    Not called itself, since importing PEFT takes seconds.
    """
    targets, layers = config.target_modules, config.layers_to_transform
    if is_named(config.exclude_modules or (), module) or not is_named(targets, module):
        return False
    if isinstance(targets, str) or module in targets or layers in (None, []):
        return True
    given = config.layers_pattern or []
    patterns = [rf"(?:^|.*?\.){p}" for p in ([given] if isinstance(given, str) else given)]
    patterns = patterns or [r".*?\.[^.]*"]
    matches = (re.match(rf"{pattern}\.(?P<layer>\d+)\.", module) for pattern in patterns)
    found = next(filter(None, matches), None)
    return found is not None and int(found["layer"]) in (
        [layers] if isinstance(layers, int) else layers
    )


def is_named(names: str | Iterable[str], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def rank_and_scaling(config: Config, module: str) -> tuple[int, float]:
    """As PEFT finds them: a pattern's key matches the end of the module's name."""

    def value(patterns: dict | None, default):
        matching = (v for k, v in (patterns or {}).items() if re.match(rf"(.*\.)?({k})$", module))
        return next(matching, default)

    rank = value(config.rank_pattern, config.r)
    alpha = value(config.alpha_pattern, config.lora_alpha)
    return rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)


def bare(value: object) -> str:
    return brief(value).strip("'")
