"""Which layers are quantized and which can have an adapter: asked here alone.

By transformers' rule for the first (integrations/bitsandbytes.py, replace_with_bnb_linear): the
class itself, no subclass, and neither the output head nor what is tied or kept in float32. By that
of PEFT for the second (tuners_utils.py): any Linear but the head, less what it refuses in some
families, and less what chooses experts.
"""

import difflib
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from stages.shared.process import StageError

# PEFT's _check_lora_target_modules_mamba: modules whose code reads their weights past an adapter.
_MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_READ_DIRECTLY = ("out_proj", "conv1d")
# Nor do these see an adapter: their mixers read the weights themselves.
_OWN_CODE = {"jamba": ("dt_proj",)}
# What chooses experts, or weighs the shared one, is called so beside them.
_ROUTERS = ("gate", "router", "shared_expert_gate")


def quantized_linears(model: PreTrainedModel) -> set[str]:
    """Names of the modules of `model` that NF4 replaces, or has replaced."""
    tied = model.all_tied_weights_keys
    # As get_keys_to_not_convert finds them while a model is loaded, when nothing is tied yet.
    last, _ = list(model.named_parameters(remove_duplicate=False))[-1]
    head = [name for name, module in model.named_modules() if module is _head(model)]
    kept = [key.removesuffix(".weight") for key in (*tied, *tied.values(), last)]
    kept += [*head, *(model._keep_in_fp32_modules or [])]
    return {
        name
        for name, module in model.named_modules()
        # Linear4bit by its name: importing bitsandbytes takes seconds.
        if (type(module) is torch.nn.Linear or type(module).__name__ == "Linear4bit")
        and should_convert_module(name, kept)
    }


def adaptable_linears(model: PreTrainedModel) -> list[str]:
    """Names of the modules of `model` that `all-linear` gives an adapter, in order."""
    without = unadaptable_linears(model)
    return [name for name, _ in _linears(model) if name not in without]


def unadaptable_linears(model: PreTrainedModel) -> list[str]:
    """Names of the Linears of `model`, its head apart, that cannot have an adapter."""
    kind = model.config.model_type
    # Layers that look at images: without one they are passed over.
    passed = [f".{i}." for i in getattr(model.config, "cross_attention_layers", None) or ()]
    banned = (_READ_DIRECTLY if kind in _MAMBA else ()) + _OWN_CODE.get(kind, ())
    routers = _routers(model)
    return [
        name
        for name, _ in _linears(model)
        if name.rsplit(".", 1)[-1] in banned
        or any(layer in name for layer in passed)
        or any(name == router or name.startswith(f"{router}.") for router in routers)
    ]


def targets_of(wanted: str | list[str], names: Iterable[str], experts: bool = False) -> set[str]:
    """Those of `names`, layers that can have an adapter, that get one.

    wanted   lora.target_modules, matched as PEFT does (by the end of the name)
    experts  whether the model has some, for the message

    Raises StageError for a name that is none of them: PEFT would skip it in silence.
    """
    names = list(names)
    if wanted == "all-linear":
        return set(names)
    found = set[str]()
    for target in wanted:
        matches = [name for name in names if name == target or name.endswith(f".{target}")]
        if not matches:
            short = sorted({name.rsplit(".", 1)[-1] for name in names})
            near = difflib.get_close_matches(target, short, 1, 0.4)
            hint = f"did you mean {near[0]}? " if near else ""
            raise StageError(
                f"params.yaml: lora.target_modules: {target} is no linear layer of the base "
                f"that can be adapted; {hint}It has {', '.join(short)}"
                f"{', and experts, which get none' if experts else ''}"
            )
        found.update(matches)
    return found


def _routers(model: PreTrainedModel) -> list[str]:
    return [
        f"{name}.{child}"
        for name, module in model.named_modules()
        if hasattr(module, "experts")
        for child, _ in module.named_children()
        if child in _ROUTERS
    ]


def _linears(model: PreTrainedModel) -> list[tuple[str, torch.nn.Linear]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not _head(model)
    ]


def _head(model: PreTrainedModel) -> torch.nn.Module | None:
    return model.get_output_embeddings()
