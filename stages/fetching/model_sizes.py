"""Is config.json that of the weights? Where not, loading fails hours later, or makes some up."""

import re
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stages.fetching.model_files import ANOTHER, COPY
from stages.shared.bounded import bounded
from stages.shared.loading import one_line
from stages.shared.outputs import read_json
from stages.shared.process import StageError
from stages.shared.screen import brief

_LAYER = re.compile(r"(.+\.)(\d+)\..+")


def declared_shapes(folder: Path, id: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that Transformers makes by `folder`/config.json.

    Raises StageError for what no model can be made of, and for settings that are not the model's.
    """
    _check_settings(read_json(folder / "config.json"), id)
    return bounded(partial(_make, folder, id), f"{id}: making a model of config.json", ANOTHER)


def _make(folder: Path, id: str) -> dict[str, tuple[int, ...]]:
    what = f"{id}: no model can be made of config.json"
    with one_line(what, f"{COPY}, or {ANOTHER}"), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _check_settings(config: dict, id: str) -> None:
    parts = [config, *(v for k, v in config.items() if k.endswith("_config") and v)]
    for part in filter(lambda part: isinstance(part, dict), parts):
        for key in ("_attn_implementation", "attn_implementation"):
            if part.get(key) is not None:
                raise StageError(
                    f"{id}: config.json: {key} is {brief(part[key])}, which train.attention "
                    f"decides here; {COPY}"
                )
        pad, rows = part.get("pad_token_id"), part.get("vocab_size")
        if isinstance(pad, int) and isinstance(rows, int) and not -rows <= pad < rows:
            raise StageError(
                f"{id}: config.json: pad_token_id {pad} has no row in the embeddings, which have "
                f"{rows} (vocab_size); {COPY}"
            )


def check_sizes(
    folder: Path, files: list[str], declared: dict[str, tuple[int, ...]], id: str
) -> None:
    """Raise StageError when the weights in `files` have other shapes or layers than `declared`.

    Tensors that Transformers renames or joins when it loads them are passed over.
    """
    from safetensors import safe_open

    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(folder / file, "pt") as tensors:
            found |= {
                name: tuple(tensors.get_slice(name).get_shape())
                for name in tensors.keys()  # noqa: SIM118 (safe_open is not a dict)
            }
    for name in sorted(found.keys() & declared.keys()):
        if found[name] != declared[name]:
            raise StageError(
                f"{id}: {name} is {_by(found[name])} in the weights and {_by(declared[name])} by "
                "config.json; one of the two is of another model"
            )
    has, says = _layers(found), _layers(declared)
    for prefix in sorted(has.keys() & says.keys()):
        if has[prefix] != says[prefix]:
            raise StageError(
                f"{id}: the weights have {has[prefix]} layers ({prefix}…) and config.json says "
                f"{says[prefix]}; one of the two is of another model"
            )


def _layers(names) -> dict[str, int]:
    """How many layers each list of modules has, by what its names begin with."""
    counts: dict[str, int] = {}
    for prefix, number in (match.groups() for match in map(_LAYER.fullmatch, names) if match):
        counts[prefix] = max(counts.get(prefix, 0), int(number) + 1)
    return counts


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"
