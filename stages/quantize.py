"""Quantize the base model once, tensor by tensor, into the form that every later stage loads.

    python -m stages.quantize

Reads models/base, writes models/quantized: the same folder with each Linear's weight in NF4 as
bitsandbytes serializes it (`quantize.type: nf4`), or the 16-bit weights as they are (`none`).
No model is instantiated: the peak is one output shard and one tensor, at any model size. The
bytes equal those of transformers' own save_pretrained of a model loaded in bfloat16.
"""

import shutil
from pathlib import Path

from stages.shared.libraries import load_libraries
from stages.shared.outputs import check_sums, link_or_copy, read_json, whole_folder, write_json
from stages.shared.params import load_params
from stages.shared.process import StageError, begin

if __name__ == "__main__":
    begin("quantize")
    load_libraries("bitsandbytes", "transformers.modeling_utils")

import torch
from accelerate import init_empty_weights
from bitsandbytes import functional as bnb
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

BASE = Path("models/base")
QUANTIZED = Path("models/quantized")
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


def linear_weights(folder: Path) -> set[str]:
    """Names of the weights to quantize: every Linear except the output embeddings."""
    config = AutoConfig.from_pretrained(folder)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    output = model.get_output_embeddings()
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not output
    }


def quantized_tensors(name: str, weight: torch.Tensor, double_quant: bool) -> dict:
    """NF4 form of one weight [out, in]: packed nibbles (uint8) and the state to undo them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    packed, state = bnb.quantize_4bit(
        weight.to(device, torch.bfloat16), compress_statistics=double_quant, quant_type="nf4"
    )
    parts = {f"{name}.{key}": value.cpu() for key, value in state.as_dict(packed=True).items()}
    return {name: packed.cpu()} | parts


def quantize(base: Path, out: Path, double_quant: bool) -> None:
    """Stream the weights of `base` into `out`, at most SHARD_BYTES in memory."""
    wanted, shards, pending, size = linear_weights(base), [], {}, 0
    sources = sorted(base.glob("*.safetensors"))

    def flush() -> None:
        nonlocal pending, size
        save_file(pending, out / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append({name: t.numel() * t.element_size() for name, t in pending.items()})
        pending, size = {}, 0

    missing = set(wanted)
    total = sum(file.stat().st_size for file in sources)
    with tqdm(total=total / 1e9, unit="GB", desc="quantize", disable=None) as bar:
        for source in sources:
            with safe_open(source, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (safe_open is not a dict)
                    tensor = tensors.get_tensor(name)
                    bar.update(tensor.numel() * tensor.element_size() / 1e9)
                    missing.discard(name)
                    if name in wanted:
                        made = quantized_tensors(name, tensor, double_quant)
                    else:
                        made = {name: tensor.to(torch.bfloat16)}
                    added = sum(t.numel() * t.element_size() for t in made.values())
                    if pending and size + added > SHARD_BYTES:
                        flush()
                    pending |= made
                    size += added
    flush()
    if missing:
        raise StageError(
            f"{base}: the weight {min(missing)} of the model is not in its files (its layers may "
            "be fused or renamed); such an architecture cannot be quantized tensor by tensor"
        )
    name_shards(out, shards)
    config = read_json(base / "config.json")
    config["dtype"] = "bfloat16"
    config["quantization_config"] = quantization_config(double_quant).to_dict()
    write_json(out / "config.json", config, sort_keys=True)


def name_shards(out: Path, shards: list[dict[str, int]]) -> None:
    """Give the numbered shards the Hub's names, with an index when there are several."""
    if len(shards) == 1:
        (out / "0.safetensors").rename(out / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, name in enumerate(names):
        (out / f"{i}.safetensors").rename(out / name)
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {
        "metadata": {"total_size": sum(sum(shard.values()) for shard in shards)},
        "weight_map": weight_map,
    }
    write_json(out / "model.safetensors.index.json", index, sort_keys=True)


def link(base: Path, out: Path) -> None:
    """Give `out` the weights of `base` without a second copy on disk where links work."""
    for file in [*base.glob("*.safetensors"), *base.glob("*.safetensors.index.json")]:
        link_or_copy(file, out / file.name)
    shutil.copyfile(base / "config.json", out / "config.json")


def main() -> None:
    params = load_params().quantize
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
    size = sum(file.stat().st_size for file in QUANTIZED.glob("*.safetensors")) / 1e9
    print(f"quantize: wrote {size:.2f} GB to {QUANTIZED}")


if __name__ == "__main__":
    main()
