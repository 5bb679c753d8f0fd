"""Checks that the weights in a model's files belong to the model of config.json."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from stages.shared.experts import PACKED, expert_tensors, part_of, stored_packed
from stages.shared.linears import quantized_linears
from stages.shared.mxfp4 import GROUP
from stages.shared.process import StageError
from stages.shared.screen import tell
from stages.shared.text_model import (
    is_multimodal,
    kept_in_float32,
    language_model,
    language_names,
    loading_report,
    of_no_module,
)
from stages.shared.weights import NF4_STATE, READ, TYPES, Weights, row_blocks


@dataclass(frozen=True)
class Names:
    """Tensors of a checkpoint, and their names in its language model.

    of         by name in the files; what is of other towers is left out
    quantized  those of the weights to quantize: what transformers would, by their new names
    experts    shapes [E, a, b] of the model's tensors of experts, by name
    kept       those that keep their type and values
    carried    those of `kept` that belong to no module
    packed     parts of experts that are in MXFP4 already, by their new names
    own_head   whether the output head differs from the embeddings, though config.json ties them
    apart      whether a folder of the language model in 16 bit is another than the checkpoint
    """

    of: dict[str, str]
    quantized: set[str]
    experts: dict[str, tuple[int, ...]]
    kept: set[str]
    carried: set[str]
    packed: set[str]
    own_head: bool
    apart: bool

    @property
    def renamed(self) -> bool:
        """Whether any tensor has another name here."""
        return any(key != name for key, name in self.of.items())


def check_names(folder: Path) -> Names:
    """Print what the files of `folder` contain beside the model. Raise StageError if they lack a
    weight of it or have it in another shape: transformers would initialize it at random.
    """
    try:
        model, report = loading_report(folder)
    except RuntimeError:
        # transformers joins tensors of experts, which must all be there and alike.
        raise StageError(
            f"{folder}: transformers cannot make the model of the tensors in its files: some are "
            "missing, or of another shape; name another model.revision or model.id"
        ) from None
    if wrong := sorted(report["mismatched_keys"]):
        name, found, expected = wrong[0]
        raise StageError(
            f"{folder}: {name} is {tuple(found)} in the files and {tuple(expected)} in "
            "config.json; one of them belongs to another model"
        )
    keys, letters = {}, {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (safe_open is not a dict)
                part = tensors.get_slice(key)
                keys[key], letters[key] = tuple(part.get_shape()), part.get_dtype()
    for key in sorted(keys):
        if f"{PACKED}." in key or key.endswith(NF4_STATE) or part_of(key):
            raise StageError(
                f"{folder}: {key} has a name that this pipeline gives to quantized weights; remove "
                "it from a copy, with model.source: local, or choose another model"
            )
    packed = packed_parts(folder, model, keys, letters)
    left = sorted(report["unexpected_keys"] - packed.keys())
    if missing := sorted(
        name for name in report["missing_keys"] if not stored_packed(name).keys() <= packed.keys()
    ):
        raise StageError(_missing(folder, model, missing, left))
    if left:
        tell(f"quantize: not part of the model, and without effect: {_shown(left)}")
    of, carried = language_names(model, set(keys)) | packed, set[str]()
    if is_multimodal(model.config):
        language = language_model(model.config)
        tell_left_out(model, language)
    else:
        language = model
        # Of no module, or joined with others by transformers.
        others = keys.keys() - of.keys() - set(of.values())
        carried = of_no_module(model, others)
        of |= {key: key for key in others}
    check_types(folder, language, of, letters)
    wanted = {f"{name}.weight" for name in quantized_linears(language)}
    if renamed := sorted(wanted - set(of.values())):
        raise StageError(
            f"{folder}: the weight {renamed[0]} of the model has another name in its files, or is "
            "fused with others, so it cannot be quantized or merged tensor by tensor"
        )
    # transformers itself makes one tensor of those of several experts.
    apart = language is not model or any(k != n and not part_of(n) for k, n in of.items())
    experts = {name: tuple(tensor.shape) for name, tensor in expert_tensors(language).items()}
    whole_numbers = {name for key, name in of.items() if letters[key] not in TYPES}
    kept = kept_in_float32(language, of.values()) | carried | whole_numbers - set(packed.values())
    own_head = differs_from_embeddings(folder, language, of)
    return Names(of, wanted, experts, kept, carried, set(packed.values()), own_head, apart)


def differs_from_embeddings(folder: Path, model: PreTrainedModel, of: dict[str, str]) -> bool:
    """Whether the files have an output head that differs from the embeddings, though config.json
    ties them.

    transformers 5 then does not tie them; transformers 4 and others do, and compute something else.
    """
    if not getattr(model.config, "tie_word_embeddings", False):
        return False
    modules = {module: f"{name}.weight" for name, module in model.named_modules()}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = [modules[module] for module in (embeddings, head) if module in modules]
    if len(names) < 2 or not set(names) <= set(of.values()):
        return False
    weights, cpu = Weights(folder, of), torch.device("cpu")
    first, second = (weights.reader(name, cpu) for name in names)
    blocks = row_blocks(weights.shapes[names[0]], cpu)
    if all(torch.equal(first(block), second(block)) for block in blocks):
        return False
    tell(
        f"quantize: {names[1]} differs from {names[0]}, to which config.json ties it; it stays "
        "a matrix of its own (tie_word_embeddings: false)"
    )
    return True


def check_types(
    folder: Path, model: PreTrainedModel, of: dict[str, str], letters: dict[str, str]
) -> None:
    """Raise StageError if a tensor that becomes a parameter of `model` is not of a float type, or
    another of a type that merge cannot copy.

    of       by name in the files, the names here
    letters  the types by name in the files, as safetensors calls them
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for key, name in sorted(of.items()):
        if letters[key] not in TYPES and (name in parameters or part_of(name)):
            raise StageError(
                f"{folder}: {key} is {letters[key]}, not a float type: the weights are quantized "
                "in a form that is not supported; choose their 16-bit original"
            )
    for key, kind in sorted(letters.items()):
        if kind not in READ:
            raise StageError(
                f"{folder}: {key} is {kind}, which is not known here; remove it from a copy, with "
                "model.source: local, or choose another model"
            )


def packed_parts(
    folder: Path, model: PreTrainedModel, shapes: dict[str, tuple], letters: dict[str, str]
) -> dict[str, str]:
    """Names here of the parts of packed experts, by their names in the files, whose `shapes` and
    types are given.

    Raises StageError where they do not make the model's tensors.
    """
    found: dict[str, str] = {}
    for name, tensor in expert_tensors(model).items():
        parts = stored_packed(name)
        if not parts.keys() <= shapes.keys():
            continue
        experts, rows, columns = tensor.shape
        scales = experts, columns, rows // GROUP
        for key, expected in zip(parts, ((*scales, GROUP // 2), scales), strict=True):
            if shapes[key] != expected:
                raise StageError(
                    f"{folder}: {key} is {shapes[key]} in the files and {expected} by config.json; "
                    "one of the two is of another model"
                )
            if letters[key] != "U8":
                raise StageError(
                    f"{folder}: {key} is {letters[key]} and not U8, as MXFP4 is; download the "
                    "whole model again, or choose another"
                )
        if name in shapes:
            raise StageError(
                f"{folder}: the files have {name} both as it is and in MXFP4; remove one of the "
                "two from a copy, with model.source: local"
            )
        found |= parts
    return found


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
