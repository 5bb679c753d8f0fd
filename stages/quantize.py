"""Quantize the base model once, tensor by tensor, into the form that every later stage loads.

    python -m stages.quantize

Reads models/base, writes models/quantized: the same folder with each Linear's weight in NF4 as
bitsandbytes serializes it (`quantize.type: nf4`), or the 16-bit weights as they are (`none`).
No model holds them: the peak is one output shard and one tensor, at any model size, or the packed
experts of a layer or two. The bytes equal those of transformers' own save_pretrained of a model
loaded in bfloat16, but for experts, which that leaves in 16 bit (stages/shared/packed.py).
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from stages.shared.libraries import load_libraries
from stages.shared.outputs import (
    check_sums,
    link_or_copy,
    read_json,
    whole_folder,
    write_json,
    write_metrics,
)
from stages.shared.params import load_params
from stages.shared.process import begin

if __name__ == "__main__":
    begin("quantize")
    load_libraries("bitsandbytes", "transformers.modeling_utils")

import torch
from huggingface_hub.constants import SAFETENSORS_INDEX_FILE, SAFETENSORS_SINGLE_FILE
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import BitsAndBytesConfig

from stages.quantizing.names import Names, check_names
from stages.quantizing.nf4_tensors import Stacks, quantized_tensors
from stages.shared.device import memory_metrics, pick_device
from stages.shared.embeddings import untied
from stages.shared.experts import part_of
from stages.shared.mxfp4 import STORAGE
from stages.shared.paths import BASE, QUANTIZED
from stages.shared.provenance import provenance
from stages.shared.text_model import read_config
from stages.shared.weights import KEPT, NAMES

COST = Path("metrics/quantize_cost.json")

SHARD_BYTES = 2_000_000_000
CARRIED = ("generation_config.json", "source.json")


def quantization_config(double_quant: bool) -> BitsAndBytesConfig:
    """NF4 with bfloat16 products (QLoRA, arXiv 2305.14314, section 3)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=double_quant,
    )


def quantize(base: Path, out: Path, double_quant: bool) -> None:
    """Stream the weights of `base` into `out`, at most SHARD_BYTES in memory."""
    names, device = check_names(base), pick_device()
    stacks = Stacks(names, double_quant, device)

    def made(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if name in names.quantized:
            return quantized_tensors(name, tensor, double_quant, device)
        if name in names.experts or part_of(name):
            return stacks.made(name, tensor)
        as_it_is = name in names.kept or name in names.packed
        return {name: tensor if as_it_is else tensor.to(torch.bfloat16)}

    if names.packed:
        print("quantize: the experts are in MXFP4 already, and stay so to the bit")
    stream(base, out, names, made)
    stacks.check_whole()
    config = config_of(base, names)
    config["dtype"] = "bfloat16"
    config["quantization_config"] = quantization_config(double_quant).to_dict()
    write_json(out / "config.json", config, sort_keys=True)


def stream(
    base: Path,
    out: Path,
    names: Names,
    made: Callable[[str, torch.Tensor], dict[str, torch.Tensor]],
) -> None:
    """Write what `made` gives of each tensor of the language model, and the names if they differ
    from those in `base`."""
    size = 0
    shards: list[dict[str, int]] = []
    pending: dict[str, torch.Tensor] = {}
    sources = sorted(base.glob("*.safetensors"))

    def flush() -> None:
        nonlocal pending, size
        save_file(pending, out / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append({name: t.numel() * t.element_size() for name, t in pending.items()})
        pending, size = {}, 0

    total = sum(file.stat().st_size for file in sources)
    with tqdm(total=total / 1e9, unit="GB", desc="quantize", disable=None) as bar:
        for source in sources:
            with safe_open(source, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (safe_open is not a dict)
                    if key not in names.of:
                        continue
                    tensor = tensors.get_tensor(key)
                    bar.update(tensor.numel() * tensor.element_size() / 1e9)
                    parts = made(names.of[key], tensor)
                    added = sum(t.numel() * t.element_size() for t in parts.values())
                    if pending and size + added > SHARD_BYTES:
                        flush()
                    pending |= parts
                    size += added
    flush()
    name_shards(out, shards)
    write_names(out, names)


def write_names(out: Path, names: Names) -> None:
    """Leave in `out` what later stages need to know of its tensors, if anything."""
    if names.apart or names.renamed:
        keys = {name: key for key, name in names.of.items()}
        write_json(out / NAMES, keys, sort_keys=True)
    if names.kept:
        carried = {"carried": sorted(names.carried)} if names.carried else {}
        write_json(out / KEPT, {"names": sorted(names.kept)} | carried)


def config_of(base: Path, names: Names) -> dict:
    """config.json of the language model: where it is all of the checkpoint, that of the files, but
    for an output head that it ties and that differs."""
    config, language = read_json(base / "config.json"), read_config(base)
    if config.pop("quantization_config", None):
        config[STORAGE] = "mxfp4"
    if language.model_type != config["model_type"]:
        config = language.to_diff_dict()
    return untied(config) if names.own_head else config


def name_shards(out: Path, shards: list[dict[str, int]]) -> None:
    """Give the numbered shards the Hub's names, with an index when there are several."""
    if len(shards) == 1:
        (out / "0.safetensors").rename(out / SAFETENSORS_SINGLE_FILE)
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, name in enumerate(names):
        (out / f"{i}.safetensors").rename(out / name)
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {
        "metadata": {"total_size": sum(sum(shard.values()) for shard in shards)},
        "weight_map": weight_map,
    }
    write_json(out / SAFETENSORS_INDEX_FILE, index, sort_keys=True)


def link(base: Path, out: Path) -> None:
    """Give `out` the weights of `base`, looked through, without a second copy on disk where links
    work and names are the same."""
    names = check_names(base)
    if names.apart:
        keys = {name: key for key, name in names.of.items()}
        # Those of an expert stay apart, under the names by which transformers joins them.
        stream(base, out, names, lambda name, x: {keys[name] if part_of(name) else name: x})
        write_json(out / "config.json", config_of(base, names), sort_keys=True)
        return
    for file in [*base.glob("*.safetensors"), *base.glob("*.safetensors.index.json")]:
        link_or_copy(file, out / file.name)
    write_names(out, names)
    if names.own_head:
        write_json(out / "config.json", config_of(base, names), sort_keys=True)
    else:
        shutil.copyfile(base / "config.json", out / "config.json")


def main() -> None:
    params = load_params().quantize
    started = time.monotonic()
    check_sums(BASE, "fetch_model")
    size = sum(file.stat().st_size for file in BASE.glob("*.safetensors")) / 1e9
    print(f"quantize: {size:.2f} GB of weights to {params.type}", flush=True)
    with whole_folder(QUANTIZED) as out:
        if params.type == "nf4":
            quantize(BASE, out, params.double_quant)
        else:
            link(BASE, out)
        for name in CARRIED:
            if (BASE / name).exists():
                shutil.copyfile(BASE / name, out / name)
    cost = {"quantize_seconds": time.monotonic() - started} | memory_metrics()
    write_metrics(COST, provenance(pick_device()) | cost)
    size = sum(file.stat().st_size for file in QUANTIZED.glob("*.safetensors")) / 1e9
    print(f"quantize: wrote {size:.2f} GB to {QUANTIZED}")


if __name__ == "__main__":
    main()
