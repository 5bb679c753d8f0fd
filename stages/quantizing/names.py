"""Are the weights in a model's files those of the model that config.json makes?"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from stages.shared.process import StageError


def linear_weights(folder: Path) -> set[str]:
    """Names of the weights to quantize: every Linear except the output embeddings.

    Names what the files of `folder` hold beside the model. Raises StageError where they lack a
    weight of it, or have it in another shape: transformers would make up its values.
    """
    model, report = _on_meta(folder)
    if wrong := sorted(report["mismatched_keys"]):
        name, found, expected = wrong[0]
        raise StageError(
            f"{folder}: {name} is {tuple(found)} in the files and {tuple(expected)} by "
            "config.json; one of the two is of another model"
        )
    left = sorted(report["unexpected_keys"])
    if missing := sorted(report["missing_keys"]):
        raise StageError(_missing(folder, model, missing, left))
    if left:
        print(f"quantize: not part of the model, and without effect: {_shown(left)}")
    output = model.get_output_embeddings()
    wanted = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not output
    }
    names = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names |= set(tensors.keys())
    if renamed := sorted(wanted - names):
        raise StageError(
            f"{folder}: the weight {renamed[0]} of the model has another name in its files, or is "
            "fused with others; such an architecture cannot be quantized or merged tensor by tensor"
        )
    return wanted


def _on_meta(folder: Path) -> tuple[PreTrainedModel, dict[str, set]]:
    """The model without its values, and what transformers finds when it compares it with the
    files. No tensor is read."""
    before = logging.get_verbosity()
    # Its own report is a table of many lines.
    logging.set_verbosity(logging.CRITICAL)
    try:
        # Typed as the model alone, which it is without output_loading_info.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(before)
    return loaded


def _missing(folder: Path, model: PreTrainedModel, missing: list[str], left: list[str]) -> str:
    """What is said of the names `missing`, where the files hold `left` beside the model."""
    renamed = [(name, other) for name in missing for other in left if other.endswith(f".{name}")]
    head = model.get_output_embeddings().weight
    if len(missing) == 1 and model.get_parameter(missing[0]) is head:
        remedy = (
            "if the model takes its embeddings for it, say tie_word_embeddings: true in the "
            "config.json of a copy, with model.source: local"
        )
    elif renamed:
        name, other = renamed[0]
        remedy = (
            f"they call {name} {other}: rename the tensors in a copy, with model.source: local, or "
            "name the model.id of the language model alone"
        )
    else:
        remedy = "the model is incomplete: name another model.revision or model.id"
    return f"{folder}: the files lack {_shown(missing)} of the model; {remedy}"


def _shown(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
