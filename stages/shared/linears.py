"""Decides which linear layers are quantized and which can have an adapter.

Quantized, as in transformers (integrations/bitsandbytes.py, replace_with_bnb_linear): modules of
the class Linear itself, except the output head and modules that are tied or kept in float32.
Adaptable, as in PEFT (tuners_utils.py): any Linear except the head, what PEFT refuses in some
families, and routers of experts.
"""

import difflib
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from stages.shared.process import StageError

# PEFT refuses these (_check_lora_target_modules_mamba): code that reads a weight directly bypasses
# its adapter.
_MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_READ_DIRECTLY = ("out_proj", "conv1d")
# PEFT does not refuse these, but their mixers bypass an adapter too.
_OWN_CODE = {"jamba": ("dt_proj",)}
# Names of routers, and of the gate of a shared expert, beside a module `experts`.
_ROUTERS = ("gate", "router", "shared_expert_gate")


def quantized_linears(model: PreTrainedModel) -> set[str]:
    """Names of the modules of `model` that are, or will be, in NF4."""
    tied = model.all_tied_weights_keys
    # Like get_keys_to_not_convert, which is called while a model is loaded and nothing is tied yet.
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
    """Names of the modules of `model` that get an adapter with `all-linear`, in order."""
    without = unadaptable_linears(model)
    return [name for name, _ in _linears(model) if name not in without]


def unadaptable_linears(model: PreTrainedModel) -> list[str]:
    """Names of the Linears of `model`, except its head, that cannot have an adapter."""
    kind = model.config.model_type
    # Cross-attention to images, which is skipped for text.
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
    """The layers among the adaptable ones, `names`, that get an adapter.

    wanted   lora.target_modules, matched like in PEFT (by the end of the name)
    experts  whether the model has experts; for the message only

    Raises StageError for a target that matches none, which PEFT would silently skip.
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
                f"{'; its experts get adapters by lora.experts: true' if experts else ''}"
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
