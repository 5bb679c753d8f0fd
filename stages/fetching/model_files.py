"""Which files of a model are fetched, and what the pipeline requires of a model."""

import fnmatch
import re
from pathlib import Path, PurePosixPath
from typing import Annotated

from huggingface_hub.constants import SAFETENSORS_INDEX_FILE as INDEX
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as SINGLE
from pydantic import Field
from safetensors import SafetensorError, safe_open
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from stages.shared.foreign import Foreign, check_name, held_to, read_object
from stages.shared.loading import TokenIds, check_tokenizer
from stages.shared.multimodal import MULTIMODAL
from stages.shared.process import StageError
from stages.shared.screen import brief

# Fetched beside the weights: config, tokenizer, templates, processors, licence. No README and no
# code.
_SMALL = ("*.json", "*.model", "*.txt", "*.jinja", "licen[cs]e*", "notice*", "use_policy*")
# The only files taken from subfolders.
_TEMPLATES = re.compile(r"additional_chat_templates/[^/]+\.jinja")
ANOTHER = "choose another model"
AGAIN = "download the whole model again"
COPY = "fix it in a copy of the model, with model.source: local"
# Longer than any, and the numbers in it are ones that Python converts.
LONGEST_NAME = 1000
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")


def small_files(files: dict[str, int], id: str) -> list[str]:
    """The names to fetch beside the weights. Raises StageError when the model cannot be used."""
    if "adapter_config.json" in files and "config.json" not in files:
        raise StageError(f"{id} is an adapter, not a model; name its base model")
    if "config.json" not in files:
        raise StageError(
            f"{id} has no config.json: not a model in the Transformers format; {ANOTHER}"
        )
    if SINGLE not in files and INDEX not in files:
        pickled = [name for name in files if PurePosixPath(name).suffix in _PICKLED]
        if pickled:
            raise StageError(
                f"{id} has only pickled weights ({pickled[0]}), which can run code when loaded; "
                "name a revision with model.safetensors (on the Hub often refs/pr/1), or convert "
                "it in a sandbox with save_pretrained of Transformers"
            )
        raise StageError(f"{id} has neither {SINGLE} nor {INDEX}; {AGAIN}")
    return [
        name
        for name in files
        if ("/" not in name or _TEMPLATES.fullmatch(name))
        and any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in _SMALL)
        and (not name.endswith(".index.json") or name == INDEX)
        and not (name == INDEX and SINGLE in files)
    ]


def weight_files(folder: Path, files: dict[str, int], id: str) -> list[str]:
    """The safetensors files that Transformers would load: the single file, or those in the index.

    Other copies in the repository (consolidated.safetensors, original/) are ignored.
    """
    if SINGLE in files:
        return [SINGLE]
    shards = set(_weight_map(folder, id).values())
    for shard in sorted(shards):
        check_name(shard, f"{id}: {INDEX}")
        if shard not in files or not shard.endswith(".safetensors"):
            what = f"{id}: {INDEX} names {shard}, which is missing or not safetensors"
            raise StageError(f"{what}; {AGAIN}, or {ANOTHER}")
    if not shards:
        raise StageError(f"{id}: {INDEX} names no weights; {AGAIN}")
    return sorted(shards)


# The one quantized form that is trained as it comes: model_type and quant_method.
MXFP4 = ("gpt_oss", "mxfp4")


class Tower(Foreign):
    # Bounds the modules that are created before anything can be measured.
    num_hidden_layers: Annotated[int, Field(ge=1, le=2000)] | None = None
    vocab_size: Annotated[int, Field(ge=1, lt=2**24)] | None = None
    quantization_config: dict | None = None


class Config(TokenIds, Tower):
    """The keys of config.json that this pipeline reads; Transformers checks the rest."""

    model_type: str
    architectures: list[str] | None = None
    auto_map: dict[str, str | list[str | None]] | None = None
    tie_word_embeddings: bool | None = None
    text_config: Tower | None = None
    vision_config: Tower | None = None


class Index(Foreign):
    weight_map: dict[str, str] = Field(default_factory=dict)


def _weight_map(folder: Path, id: str) -> dict[str, str]:
    """Tensor name -> file name, from the index."""
    return held_to(Index, _read_json(folder / INDEX, id), f"{id}: {INDEX}").weight_map


def check_config(folder: Path, id: str) -> None:
    """Raise StageError unless config.json names a causal language model built into Transformers
    and the files beside it give a fast tokenizer."""
    config = held_to(Config, _read_json(folder / "config.json", id), f"{id}: config.json")
    kind = config.model_type
    classes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if kind in MULTIMODAL:
        classes = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    known = classes.get(kind)
    code = (config.auto_map or {}).get("AutoModelForCausalLM")
    remote = str(code).rpartition(".")[2]
    # Some repositories still name code of their own that Transformers has since adopted.
    if config.auto_map and (known is None or remote != known):
        raise StageError(
            f"{id} needs its own code (auto_map in config.json), which is never run; choose a "
            "model that is built into Transformers"
        )
    architecture = config.architectures[0] if config.architectures else known
    if known is None or architecture != known:
        if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys() - MULTIMODAL:
            raise StageError(
                f"{id} is a multimodal model of an unsupported kind ({kind}); supported are "
                f"{', '.join(sorted(MULTIMODAL))}"
            )
        raise StageError(
            f"{id} is not a causal language model that Transformers knows "
            f"(model_type {kind}, architecture {architecture}); {ANOTHER}"
        )
    towers = (config, config.text_config or config)
    methods = [(tower.quantization_config or {}).get("quant_method") for tower in towers]
    method = next(filter(None, methods), None)
    if method and (kind, method) != MXFP4:
        raise StageError(f"{id} is quantized already ({method}); choose its 16-bit original")
    if not any(any(folder.glob(name)) for name in ("tokenizer*", "vocab*", "*.model")):
        raise StageError(f"{id} has no tokenizer; copy its base model's tokenizer files into it")
    check_tokenizer(folder, id, f"{COPY}, or {ANOTHER}")


def check_weights(folder: Path, names: list[str], id: str) -> None:
    """Raise StageError if a weight file is truncated or the index and the files differ."""
    tensors: dict[str, str] = {}
    for name in names:
        try:
            with safe_open(folder / name, "np") as file:
                tensors |= dict.fromkeys(file.keys(), name)
        except SafetensorError as error:
            raise StageError(f"{id}: {name} is damaged or truncated ({error}); {AGAIN}") from None
    if long := [tensor for tensor in tensors if len(tensor) > LONGEST_NAME]:
        raise StageError(
            f"{id}: {tensors[long[0]]} has a tensor whose name has {len(long[0])} characters "
            f"({brief(long[0])}); {ANOTHER}"
        )
    if names != [SINGLE]:
        for tensor, shard in _weight_map(folder, id).items():
            if tensors.get(tensor) != shard:
                what = f"{id}: {INDEX} says that {tensor} is in {shard}, but it is not"
                raise StageError(f"{what}; {AGAIN}")


def _read_json(path: Path, id: str) -> dict:
    return read_object(path, f"{id}: {path.name}")
