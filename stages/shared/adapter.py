"""Reading a LoRA adapter for a merge: what cannot be merged right is refused by name.

An adapter is a folder as PEFT saves it (adapter_config.json, adapter_model.safetensors), made by
`train` or by any other tool. For a module with weight W [out, in] it holds A [r, in] and
B [out, r]; the merged weight is W + (B A) * alpha / r, or alpha / sqrt(r) with rsLoRA
(LoRA: arXiv 2106.09685; rsLoRA: arXiv 2312.03732).
"""

import difflib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from stages.shared.outputs import SUMS, check_sums
from stages.shared.process import StageError

WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
CONFIG = "adapter_config.json"
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
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
    "megatron_config",
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
    "use_rslora",
}
REFUSED = {
    "use_dora": "DoRA rescales whole columns of the weight",
    "modules_to_save": "whole retrained modules are not a low-rank update",
    "trainable_token_indices": "retrained embedding rows are not a low-rank update",
    "target_parameters": "LoRA on bare parameters (fused experts) has another layout",
    "fan_in_fan_out": "the base's weights are stored transposed",
    "lora_bias": "the adapter also changes biases",
    "layer_replication": "the base's layers are repeated",
    "alora_invocation_tokens": "activated LoRA acts on a part of the tokens only",
}
# Starts that leave the base's own weights as they are.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Update:
    """One module's low-rank update, still on disk."""

    file: Path
    module: str
    scaling: float

    def factors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, in] and B [out, r] in float32, as PEFT computes with them."""
        with safe_open(self.file, framework="pt") as tensors:
            return tuple(
                tensors.get_tensor(f"base_model.model.{self.module}.lora_{half}.weight").to(
                    device, torch.float32
                )
                for half in "AB"
            )


def check_adapter_sums(folder: Path) -> None:
    """Compare the adapter with its SHA256SUMS. One that was copied in may carry none."""
    if (folder / SUMS).exists():
        check_sums(folder, "train")
    else:
        print(f"{folder} has no {SUMS}: an adapter from elsewhere, taken as it is")


def read_adapter(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Update]:
    """Updates by the name of the weight they are added to.

    `shapes` are those of the base's tensors. Every factor is read once and must be finite, of
    the rank that the configuration says, and fit its weight. Raises StageError.
    """
    config, halves = _read_config(folder), _read_shapes(folder)
    updates = {}
    for module in sorted({module for module, _ in halves}):
        where, weight = f"{folder}: {module}", f"{module}.weight"
        _check_module(where, weight, shapes)
        rank, scaling = _rank_and_scaling(folder, config, module)
        of_module = {half: halves.get((module, half)) for half in "AB"}
        _check_factors(where, of_module, rank, shapes[weight])
        updates[weight] = Update(folder / WEIGHTS, module, scaling)
        for half, factor in zip("AB", updates[weight].factors(torch.device("cpu")), strict=True):
            if not factor.isfinite().all():
                raise StageError(f"{where}: lora_{half} has NaN or infinite values; train it again")
    _check_complete(folder, config, updates, shapes)
    return updates


def _read_config(folder: Path) -> dict:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{folder / CONFIG} is missing; {folder} is no PEFT adapter") from None
    except ValueError as error:
        raise StageError(f"{folder / CONFIG}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise StageError(f"{folder / CONFIG}: must hold an object")
    if config.get("peft_type") != "LORA":
        raise StageError(f"{folder / CONFIG}: peft_type {config.get('peft_type')} is not supported")
    for key, value in sorted(config.items()):
        if key in HARMLESS or key in READ or not value:
            continue
        reason = REFUSED.get(key, "its effect on a merge is not known here")
        raise StageError(f"{folder / CONFIG}: {key} is not supported: {reason}")
    if config.get("bias", "none") != "none":
        raise StageError(f"{folder / CONFIG}: bias: {config['bias']} is not supported: only none")
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise StageError(
            f"{folder / CONFIG}: init_lora_weights: {start} is not supported: it changes the "
            "base's weights; convert the adapter with PEFT's save_pretrained first"
        )
    return config


def _read_shapes(folder: Path) -> dict[tuple[str, str], tuple[int, ...]]:
    """Shape of every factor by module and half."""
    shapes = {}
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (safe_open is not a dict)
                match = KEY.fullmatch(key)
                if not match:
                    raise StageError(
                        f"{folder / WEIGHTS}: {key} is no lora_A or lora_B of a Linear "
                        "(DoRA, an embedding or a retrained module?), which is not supported"
                    )
                shapes[match["module"], match["half"]] = tuple(tensors.get_slice(key).get_shape())
    except (FileNotFoundError, SafetensorError) as error:
        if (folder / PICKLED).exists() and not (folder / WEIGHTS).exists():
            raise StageError(
                f"{folder} has pickled weights only ({PICKLED}), which can run code when loaded; "
                "convert it on a machine you can spare with PEFT's save_pretrained"
            ) from None
        raise StageError(f"{folder / WEIGHTS}: cannot be read ({error})") from None
    if not shapes:
        raise StageError(f"{folder / WEIGHTS} holds no LoRA tensor")
    return shapes


def _check_module(where: str, weight: str, shapes: dict) -> None:
    """The base must have the weight, in a Linear that a merge can add to."""
    if re.search(r"(^|\.)(lm_head|embed_tokens|embed_out|wte)\.weight$", weight):
        raise StageError(f"{where}: LoRA on the embeddings or the output head is not supported")
    if weight not in shapes:
        near = difflib.get_close_matches(weight, shapes, 1, 0)
        raise StageError(
            f"{where}: the base has no such module (nearest: "
            f"{near[0].removesuffix('.weight')}); was the adapter made for another base model?"
        )
    if len(shapes[weight]) != 2:
        raise StageError(f"{where}: not a Linear of the base but a fused layout, not supported")


def _check_factors(where: str, found: dict, rank: int, weight: tuple[int, ...]) -> None:
    """The shapes `found` of A and B must fit that of the weight, [out, in]."""
    for half, expected in {"A": (rank, weight[1]), "B": (weight[0], rank)}.items():
        if not found[half]:
            raise StageError(f"{where}: lora_{half} is missing; the adapter is incomplete")
        if found[half] != expected:
            raise StageError(
                f"{where}: lora_{half} is {_by(found[half])} and must be {_by(expected)} (rank "
                f"{rank}, weight {_by(weight)}); wrong rank, transposed, or made for another base "
                "model"
            )


def _rank_and_scaling(folder: Path, config: dict, module: str) -> tuple[int, float]:
    """As PEFT finds them: a pattern's key matches the end of the module's name."""

    def value(patterns: str, default: str):
        for key, found in (config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                return found
        return config[default]

    try:
        rank, alpha = value("rank_pattern", "r"), value("alpha_pattern", "lora_alpha")
        return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, re.error):
        raise StageError(
            f"{folder / CONFIG}: r, lora_alpha and their patterns give no scaling for {module}"
        ) from None


def _check_complete(folder: Path, config: dict, updates: dict, shapes: dict) -> None:
    """Refuse an adapter that lacks a module that its own configuration names."""
    targets = config.get("target_modules")
    if config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return
    for weight, shape in shapes.items():
        module = weight.removesuffix(".weight")
        if isinstance(targets, str):
            named = re.fullmatch(targets, module) is not None
        else:
            named = any(module == t or module.endswith(f".{t}") for t in targets or ())
        if named and weight.endswith(".weight") and len(shape) == 2 and weight not in updates:
            raise StageError(
                f"{folder}: {module} is among the adapter's target_modules and has no tensors; "
                "the adapter is incomplete or was made for another base model"
            )


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
