"""Loads a model with packed experts, which transformers' from_pretrained cannot.

The folder was written by quantize, with tensor names of the modules used here. Tensors are
memory-mapped, so that nothing is read before it is copied to its place.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from bitsandbytes.nn import Linear4bit, Params4bit
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from stages.shared.end_tokens import GENERATION
from stages.shared.experts import PACKED, expert_tensors, packed_name
from stages.shared.packed import compute_packed, put_packed
from stages.shared.packed_storages import STORAGES
from stages.shared.process import StageError
from stages.shared.weights import NF4_PARTS, NF4_STATE, carried_names

AGAIN = "repair it with: python -m tools.repair quantize"


def holds_packed(folder: Path) -> bool:
    """Whether experts in `folder` are packed."""
    return any(f"{PACKED}." in key for key in _tensors(folder))


def load_packed(
    folder: Path, device: torch.device, attention: str | None = None
) -> PreTrainedModel:
    """The model of `folder` on `device`, with packed experts. Raises StageError if a tensor is
    missing or has another shape."""
    tensors = _tensors(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention
        )

    def get(key: str) -> torch.Tensor:
        return tensors[key].get_tensor(key).to(device)

    def under(name: str) -> dict[str, torch.Tensor]:
        """Tensors whose names start with `name`, by the rest of the name."""
        start = f"{name}."
        return {key.removeprefix(start): get(key) for key in of_stack.get(name, ())}

    of_stack: dict[str, list[str]] = {}
    for key in tensors:
        if f"{PACKED}." in key:
            of_stack.setdefault(key.rpartition(".")[0], []).append(key)
    for name in expert_tensors(model):
        stored = under(packed_name(name))
        storage = next((STORAGES[key] for key in stored if key in STORAGES), None)
        if storage is None:
            raise StageError(f"{folder} lacks {name} of the model; {AGAIN}")
        try:
            put_packed(model, name, storage(**stored))
        except (TypeError, ValueError) as error:
            raise StageError(f"{folder}: {name}: {error}; {AGAIN}") from None
    compute_packed(model)
    for key in (key for key in tensors if key.endswith(NF4_STATE)):
        _put_linear(model, key.removesuffix(f".weight.{NF4_STATE}"), tensors, get)
    # Some have the name of a buffer that transformers does not load.
    carried = carried_names(folder)
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        owner, _, key = name.rpartition(".")
        if name not in tensors or name in carried or isinstance(parameter, Params4bit):
            continue
        value = get(name)
        if value.shape != parameter.shape:
            shapes = f"{tuple(value.shape)} and must be {tuple(parameter.shape)}"
            raise StageError(f"{folder}: {name} is {shapes}; {AGAIN}")
        if isinstance(parameter, torch.nn.Parameter):
            value = torch.nn.Parameter(value, requires_grad=False)
        setattr(model.get_submodule(owner), key, value)
    model.tie_weights()
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise StageError(f"{folder} lacks {name} of the model; {AGAIN}")
    for module in model.modules():
        for key, buffer in module.named_buffers(recurse=False):
            setattr(module, key, buffer.to(device))
    if (folder / GENERATION).exists():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    # Makes PEFT use its LoRA layers for Linear4bit.
    model.is_loaded_in_4bit = True
    return model.eval()


def _tensors(folder: Path) -> dict[str, safe_open]:
    """The open file of each tensor in `folder`."""
    found: dict[str, safe_open] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = safe_open(path, framework="pt")
        found |= dict.fromkeys(file.keys(), file)
    return found


def linear4bit(plain: torch.nn.Linear) -> Linear4bit:
    """A Linear4bit of the shape of `plain`, on the meta device."""
    return Linear4bit(
        plain.in_features,
        plain.out_features,
        bias=plain.bias is not None,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        device="meta",
    )


def _put_linear(model: PreTrainedModel, name: str, tensors: dict, get) -> None:
    """Replace the Linear `name` of `model` by a Linear4bit with the stored tensors."""
    plain: Any = model.get_submodule(name)  # a Linear
    module = linear4bit(plain)
    weight = get(f"{name}.weight")
    stats = {p: get(f"{name}.weight.{p}") for p in NF4_PARTS if f"{name}.weight.{p}" in tensors}
    module.weight = Params4bit.from_prequantized(
        weight, stats, requires_grad=False, device=weight.device, module=module
    )
    model.set_submodule(name, module)
