"""Finds the experts of a mixture-of-experts model and names their tensors.

transformers keeps the experts of a layer in two stacked tensors [E, a, b]: one for gate and up, one
for down. A checkpoint stores the same stacks, or one tensor per expert, or one each for an expert's
gate, up and down. A tensor that a checkpoint stores separately is named after the stacked tensor,
the number of the expert and the part of its rows: model.layers.0.mlp.experts.gate_up_proj.5.1 is
the up projection of expert 5.
"""

import re
from typing import Any

import torch
from torch import nn

from stages.shared.process import StageError

# Names of a module's expert tensors, and the suffix of the module that replaces a packed one. It
# must not end with _proj, which PEFT would take for a Linear.
TENSORS = ("gate_up_proj", "up_proj", "down_proj")
PACKED = "_packed"
# Classes without transformers' experts interface; stages/shared/packed.py replaces their forward.
OWN_CODE = {"Llama4TextExperts"}
_PART = re.compile(r"(?P<tensor>.+_proj)\.(?P<expert>\d+)\.(?P<piece>\d+)")
# Steps by which transformers stacks a checkpoint's tensors, where merge can undo them.
_KNOWN = ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])


def expert_stacks(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model` whose expert tensors can be packed, by name."""
    return {name: module for name, module in model.named_modules() if _is_stack(module)}


def expert_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors [E, a, b] of those modules, by name."""
    return {
        f"{name}.{key}": tensor
        for name, module in expert_stacks(model).items()
        for key, tensor in module.named_parameters(recurse=False)
        if key in TENSORS
    }


def unknown_experts(model: nn.Module) -> list[str]:
    """Parameters of `model` that belong to experts but cannot be packed.

    Recurrent layers have three-dimensional tensors too, so only those count whose name or class
    mentions experts or MoE.
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
    # Attributes set by transformers' decorator use_experts_implementation.
    decorated = hasattr(module, "has_gate") and hasattr(module, "is_transposed")
    return decorated or type(module).__name__ in OWN_CODE


def packed_name(tensor: str) -> str:
    """Name of the module that replaces a packed tensor: gate_up_packed for gate_up_proj."""
    return tensor.removesuffix("_proj") + PACKED


def stored_packed(tensor: str) -> dict[str, str]:
    """Names of a tensor's parts in an MXFP4 checkpoint, mapped to their names here."""
    return {f"{tensor}_{part}": f"{packed_name(tensor)}.{part}" for part in ("blocks", "scales")}


def part_name(tensor: str, expert: int, piece: int) -> str:
    """Name of the rows of one expert that the checkpoint stores as a separate tensor."""
    return f"{tensor}.{expert}.{piece}"


def part_of(name: str) -> tuple[str, int, int] | None:
    """(tensor, expert, piece) of a name made by part_name, else None."""
    match = _PART.fullmatch(name)
    return (match["tensor"], int(match["expert"]), int(match["piece"])) if match else None


def width_refused(name: str, width: int) -> str:
    """The message about experts that NF4 cannot hold."""
    return (
        f"{name} has rows of {width} values, no multiple of 64: experts of this width cannot be "
        "quantized; set quantize.type: none"
    )


def checkpoint_part(tensor: str, key: str, pattern: str, converter: Any) -> str:
    """Name here of the checkpoint's tensor `key`, which `converter` makes a part of `tensor`.

    pattern  the source pattern of `converter` that matches `key`

    Raises StageError if the conversion cannot be undone.
    """
    check_converter(tensor, converter)
    number = re.search(pattern.replace("*.", r"(\d+)\."), key)
    if not number:
        raise StageError(f"{key}: which expert of {tensor} it is cannot be told")
    return part_name(tensor, int(number[1]), converter.source_patterns.index(pattern))


def check_converter(tensor: str, converter: Any) -> None:
    """Raise StageError unless merge can undo what `converter` does to make `tensor`."""
    done = [(type(each).__name__, getattr(each, "dim", None)) for each in converter.operations]
    if done not in _KNOWN:
        steps = ", ".join(name for name, _ in done)
        raise StageError(
            f"transformers makes {tensor} of the checkpoint's tensors by {steps}, which merge "
            "cannot undo; choose another model"
        )
