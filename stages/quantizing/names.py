"""Checks that the weights in a model's files belong to the model of config.json."""

from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from transformers import PreTrainedModel

from stages.shared.linears import quantized_linears
from stages.shared.process import StageError
from stages.shared.text_model import (
    is_multimodal,
    language_model,
    language_names,
    loading_report,
)


@dataclass(frozen=True)
class Names:
    """Tensors of a checkpoint, and their names in its language model.

    of         by name in the files; what is of other towers is left out
    quantized  those of the weights to quantize: what transformers would, by their new names
    apart      whether a folder of the language model is another than the checkpoint
    """

    of: dict[str, str]
    quantized: set[str]
    apart: bool


def check_names(folder: Path) -> Names:
    """Names what the files of `folder` hold beside the model. Raises StageError where they lack a
    weight of it, or have it in another shape: transformers would make up its values.
    """
    model, report = loading_report(folder)
    if wrong := sorted(report["mismatched_keys"]):
        name, found, expected = wrong[0]
        raise StageError(
            f"{folder}: {name} is {tuple(found)} in the files and {tuple(expected)} in "
            "config.json; one of them belongs to another model"
        )
    left = sorted(report["unexpected_keys"])
    if missing := sorted(report["missing_keys"]):
        raise StageError(_missing(folder, model, missing, left))
    if left:
        print(f"quantize: not part of the model, and without effect: {_shown(left)}")
    keys = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            keys |= set(tensors.keys())
    of = language_names(model, keys)
    if is_multimodal(model.config):
        language = language_model(model.config)
        tell_left_out(model, language)
    else:
        language = model
        # Of no module: carried along.
        of |= {key: key for key in keys - of.keys() if key not in of.values()}
    wanted = {f"{name}.weight" for name in quantized_linears(language)}
    if renamed := sorted(wanted - set(of.values())):
        raise StageError(
            f"{folder}: the weight {renamed[0]} of the model has another name in its files, or is "
            "fused with others, so it cannot be quantized or merged tensor by tensor"
        )
    apart = language is not model or any(key != name for key, name in of.items())
    return Names(of, wanted, apart)


def tell_left_out(whole: PreTrainedModel, language: PreTrainedModel) -> None:
    """Say how much of a checkpoint is not its language model."""
    rest = whole.num_parameters() - language.num_parameters()
    print(
        f"quantize: {type(language).__name__} is trained; {rest / 1e6:,.0f} million parameters of "
        "other towers stay unchanged in the merged model"
    )


def _missing(folder: Path, model: PreTrainedModel, missing: list[str], left: list[str]) -> str:
    """The message about the names `missing`, if the files contain `left` beside the model."""
    renamed = [(name, other) for name in missing for other in left if other.endswith(f".{name}")]
    head = model.get_output_embeddings().weight
    if len(missing) == 1 and model.get_parameter(missing[0]) is head:
        remedy = (
            "if the model shares its embeddings, set tie_word_embeddings: true in the "
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
