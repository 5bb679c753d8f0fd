"""Where a mixture of experts has its experts, and what their tensors are called.

transformers keeps the experts of a layer in two tensors [E, a, b], of gate and up and of down. A
checkpoint has them so, or a tensor for each expert, or one for each expert's gate, up and down. A
tensor of its own in the checkpoint is called here by the model's tensor, the expert's number and
which part of its rows it is: model.layers.0.mlp.experts.gate_up_proj.5.1 is up of expert 5.
"""

import re
from typing import Any

import torch
from torch import nn

from stages.shared.process import StageError

# What a module of experts calls its tensors, and the end of the name of the module that stands for
# one which is packed. Not one that ends with _proj: PEFT would take it for a Linear.
TENSORS = ("gate_up_proj", "up_proj", "down_proj")
PACKED = "_packed"
# Modules of experts with code of their own, for which stages/shared/packed.py has another.
OWN_CODE = {"Llama4TextExperts"}
_PART = re.compile(r"(?P<tensor>.+_proj)\.(?P<expert>\d+)\.(?P<piece>\d+)")
# How transformers makes a model's tensor of those of a checkpoint, where this is undone here.
_KNOWN = ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])


def expert_stacks(model: nn.Module) -> dict[str, nn.Module]:
    """By name, the modules of `model` that hold a layer's experts in a form that can be packed."""
    return {name: module for name, module in model.named_modules() if _is_stack(module)}


def expert_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """By name, the tensors [E, a, b] of those modules."""
    return {
        f"{name}.{key}": tensor
        for name, module in expert_stacks(model).items()
        for key, tensor in module.named_parameters(recurse=False)
        if key in TENSORS
    }


def unknown_experts(model: nn.Module) -> list[str]:
    """Parameters of `model` that are experts' in a form that cannot be packed.

    Recurrent layers have tensors of three dimensions too: those of a part that is called experts
    or a mixture of them count.
    """
    known = expert_stacks(model)
    called = re.compile("expert|moe", re.IGNORECASE)
    return [
        f"{name}.{key}"
        for name, module in model.named_modules()
        if name not in known and not isinstance(module, nn.modules.conv._ConvNd)
        for key, parameter in module.named_parameters(recurse=False)
        if ".experts." in f".{name}.{key}"
        or (parameter.ndim == 3 and called.search(f"{name}.{key} {type(module).__name__}"))
    ]


def _is_stack(module: nn.Module) -> bool:
    # What transformers' use_experts_implementation gives them.
    decorated = hasattr(module, "has_gate") and hasattr(module, "is_transposed")
    return decorated or type(module).__name__ in OWN_CODE


def packed_name(tensor: str) -> str:
    """What the module is called that stands for a tensor: gate_up_packed of gate_up_proj."""
    return tensor.removesuffix("_proj") + PACKED


def stored_packed(tensor: str) -> dict[str, str]:
    """What a checkpoint in MXFP4 calls the parts of a tensor, and what they are called here."""
    return {f"{tensor}_{part}": f"{packed_name(tensor)}.{part}" for part in ("blocks", "scales")}


def part_name(tensor: str, expert: int, piece: int) -> str:
    """What the rows of one expert are called that the checkpoint has as a tensor of their own."""
    return f"{tensor}.{expert}.{piece}"


def part_of(name: str) -> tuple[str, int, int] | None:
    """(tensor, expert, piece) of a name that part_name gave, None of any other."""
    match = _PART.fullmatch(name)
    return (match["tensor"], int(match["expert"]), int(match["piece"])) if match else None


def width_refused(name: str, width: int) -> str:
    """The message about experts that NF4 cannot hold."""
    return (
        f"{name} has rows of {width} values, no multiple of 64: experts of this width cannot be "
        "quantized; set quantize.type: none"
    )


def checkpoint_part(tensor: str, key: str, pattern: str, converter: Any) -> str:
    """The name here of a checkpoint's tensor `key`, of which transformers' `converter` makes a part
    of `tensor`; `pattern` is the one that it found. Raises StageError where that is not known."""
    check_converter(tensor, converter)
    number = re.search(pattern.replace("*.", r"(\d+)\."), key)
    if not number:
        raise StageError(f"{key}: which expert of {tensor} it is cannot be told")
    return part_name(tensor, int(number[1]), converter.source_patterns.index(pattern))


def check_converter(tensor: str, converter: Any) -> None:
    """Raise StageError unless what `converter` does for `tensor` can be undone here."""
    done = [(type(each).__name__, getattr(each, "dim", None)) for each in converter.operations]
    if done not in _KNOWN:
        steps = ", ".join(name for name, _ in done)
        raise StageError(
            f"transformers makes {tensor} of the checkpoint's tensors by {steps}, which merge "
            "cannot undo; choose another model"
        )
