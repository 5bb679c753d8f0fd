"""Does config.json match the weights? If not, loading fails later or initializes some anew."""

import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stages.fetching.model_files import ANOTHER, COPY
from stages.shared.bounded import bounded
from stages.shared.experts import unknown_experts
from stages.shared.loading import one_line
from stages.shared.outputs import read_json
from stages.shared.process import StageError
from stages.shared.screen import brief
from stages.shared.text_model import check_experts, empty_model, is_multimodal, language_model

# As safetensors names them.
FLOATS = ("F64", "F32", "F16", "BF16")
_LAYER = re.compile(r"(.+\.)(\d+)\..+")


class Declared(NamedTuple):
    """Shapes of a model's parameters, and patterns of tensor names in its files that belong to no
    module: layers that predict further tokens, which Transformers leaves out."""

    shapes: dict[str, tuple[int, ...]]
    left_out: tuple[str, ...]


def declared_shapes(folder: Path, id: str) -> Declared:
    """What Transformers creates from `folder`/config.json.

    Raises StageError if no model can be created from it, or if it has settings that belong to
    params.yaml.
    """
    _check_settings(read_json(folder / "config.json"), id)
    return bounded(partial(_make, folder, id), f"{id}: building a model from config.json", ANOTHER)


def _make(folder: Path, id: str) -> Declared:
    with one_line(f"{id}: no model can be built from config.json", f"{COPY}, or {ANOTHER}"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        model = empty_model(config)
        language = language_model(config) if is_multimodal(config) else model
    _check_layers(language, id)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return Declared(shapes, tuple(model._keys_to_ignore_on_load_unexpected or ()))


def _check_layers(model: PreTrainedModel, id: str) -> None:
    """Refuse layers that later stages cannot handle."""
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            raise StageError(
                f"{id}: its weights are stored transposed ({name} is a Conv1D), which is not "
                f"supported; {ANOTHER}"
            )
    if experts := unknown_experts(model):
        raise StageError(
            f"{id} is a mixture of experts ({experts[0]}) of a kind ({model.config.model_type}) "
            f"that transformers computes by code of its own; {ANOTHER}"
        )
    try:
        check_experts(model)
    except StageError as error:
        raise StageError(f"{id}: {error}") from None
    if not getattr(model.config, "num_attention_heads", None):
        raise StageError(
            f"{id}: {model.config.model_type} has no attention, so plan cannot predict the memory "
            f"of its layers; {ANOTHER}"
        )


def _check_settings(config: dict, id: str) -> None:
    parts = [config, *(v for k, v in config.items() if k.endswith("_config") and v)]
    for part in filter(lambda part: isinstance(part, dict), parts):
        for key in ("_attn_implementation", "attn_implementation"):
            if part.get(key) is not None:
                raise StageError(
                    f"{id}: config.json: {key} is {brief(part[key])}, but train.attention decides "
                    f"that here; {COPY}"
                )
        pad, rows = part.get("pad_token_id"), part.get("vocab_size")
        if isinstance(pad, int) and isinstance(rows, int) and not -rows <= pad < rows:
            raise StageError(
                f"{id}: config.json: pad_token_id {pad} is outside the embeddings, which have "
                f"{rows} rows (vocab_size); {COPY}"
            )


def check_sizes(folder: Path, files: list[str], model: Declared, id: str) -> None:
    """Raise StageError if shapes or layers of the weights in `files` differ from those of `model`.

    Tensors that Transformers renames or joins on loading are skipped. Also raises StageError for
    quantized weights that config.json does not mention.
    """
    from safetensors import safe_open

    found: dict[str, tuple[int, ...]] = {}
    declared = model.shapes
    for file in files:
        with safe_open(folder / file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is not a dict)
                part = tensors.get_slice(name)
                found[name] = tuple(part.get_shape())
                if name in declared and part.get_dtype() not in FLOATS:
                    raise StageError(
                        f"{id}: {name} is {part.get_dtype()}, not a float type: the weights are "
                        "quantized but config.json does not say so; choose their 16-bit original"
                    )
    for name in sorted(found.keys() & declared.keys()):
        if found[name] != declared[name]:
            raise StageError(
                f"{id}: {name} is {_by(found[name])} in the weights and {_by(declared[name])} in "
                "config.json; one of them belongs to another model"
            )
    own = [n for n in found if not any(re.search(pattern, n) for pattern in model.left_out)]
    has, says = _layers(own), _layers(declared)
    for prefix in sorted(has.keys() & says.keys()):
        if has[prefix] != says[prefix]:
            raise StageError(
                f"{id}: the weights have {has[prefix]} layers ({prefix}…) and config.json says "
                f"{says[prefix]}; one of them belongs to another model"
            )


def _layers(names) -> dict[str, int]:
    """Name prefix of each list of layers -> number of layers."""
    counts: dict[str, int] = {}
    for prefix, number in (match.groups() for match in map(_LAYER.fullmatch, names) if match):
        counts[prefix] = max(counts.get(prefix, 0), int(number) + 1)
    return counts


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"
