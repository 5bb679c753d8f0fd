"""Add the adapter to the base's weights, tensor by tensor, as a 16-bit model that serves alone.

    python -m stages.merge

Reads models/quantized (`merge.base: dequantized`) or models/base (`original`) and models/adapter.
Writes models/merged: safetensors files named as the base's, config, generation config, tokenizer,
chat template and licence, and merge.json, which says what was done.
"""

import shutil
from pathlib import Path

from stages.shared.libraries import load_libraries
from stages.shared.outputs import check_space, check_sums, read_json, whole_folder, write_json
from stages.shared.params import load_params
from stages.shared.process import StageError, begin, sha256

if __name__ == "__main__":
    begin("merge")
    load_libraries("bitsandbytes")

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from stages.shared.adapter import WEIGHTS, Update, check_adapter_sums, read_adapter
from stages.shared.merging import check_rounding, merged_rows
from stages.shared.weights import INDEX, SINGLE, Weights, write_shard

BASE = Path("models/base")
QUANTIZED = Path("models/quantized")
ADAPTER = Path("models/adapter")
MERGED = Path("models/merged")
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
# A tokenizer without them needs slower code than this pipeline's.
NEEDED = ("tokenizer.json", "tokenizer_config.json")
LICENCES = ("licen[cs]e*", "notice*", "copying*", "use_policy*")


def check_layout(base: Weights, quantized: Weights) -> None:
    """The quantized tensors must be the base's: names and shapes. Raises StageError."""
    for name in base.names:
        if ".experts." in name:
            raise StageError(
                f"{base.folder}: {name}: experts are fused when a model is loaded, so mixtures "
                "of experts cannot be merged tensor by tensor; choose a dense base model"
            )
    for name in quantized.names:
        if base.shapes.get(name) != quantized.shapes[name]:
            raise StageError(
                f"{quantized.folder}: {name} has shape {quantized.shapes[name]} and in the base "
                f"{base.shapes.get(name)}; repair it with: python -m tools.repair quantize"
            )
    config = read_json(base.folder / "config.json")
    for name in sorted(set(base.names) - set(quantized.names)):
        # transformers leaves these out when it saves: it has them from elsewhere.
        tied = name == "lm_head.weight" and config.get("tie_word_embeddings")
        if not tied and not name.endswith("rotary_emb.inv_freq"):
            raise StageError(f"{quantized.folder} lacks {name} of the base (fused or renamed?)")


def write_weights(
    out: Path,
    source: Weights,
    shards: dict[str, list[str]],
    updates: dict[str, Update],
    dtype: torch.dtype,
    device: torch.device,
    sums: dict[str, str],
) -> dict:
    """Stream the merged tensors of `source` into `out` by `shards` {file: names}.

    Returns the counts for merge.json and puts the files' SHA-256 into `sums`. Raises StageError
    naming a tensor that `dtype` cannot hold.
    """
    names = [name for shard in shards.values() for name in shard]
    total = sum(torch.Size(source.shapes[name]).numel() for name in names) * dtype.itemsize
    check_space(out.parent, total, "the merged model")
    flushed: dict[str, int] = {}
    with tqdm(total=total / 1e9, unit="GB", desc="merge", disable=None) as bar:

        def stream(shard: list[str]):
            for name in shard:
                rows = merged_rows(source, name, updates.get(name), dtype, device)
                for values in check_rounding(name, rows, flushed):
                    yield values
                    bar.update(values.nbytes / 1e9)

        for file, shard in shards.items():
            shapes = {name: source.shapes[name] for name in shard}
            sums[file] = write_shard(out / file, shapes, dtype, stream(shard))
    if list(shards) != [SINGLE]:
        weight_map = {name: file for file, shard in shards.items() for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(out / INDEX, index, sort_keys=True)
    return {
        "tensors": len(names),
        "updated_tensors": len(updates),
        "bytes": total,
        "overflowed": 0,
        "flushed_to_zero": sum(flushed.values()),
    }


def write_companions(out: Path, base: Path, adapter: Path, dtype: torch.dtype) -> None:
    """Write what serving needs beside weights: configs, tokenizer, chat template, licence."""
    own = all((adapter / name).exists() for name in NEEDED)
    tokenizer = adapter if own else base
    for name in NEEDED:
        if not (tokenizer / name).exists():
            raise StageError(
                f"{base} has no {name} and {adapter} brings no tokenizer; copy the files of "
                "data/prepared/tokenizer into it, then: dvc commit --force train && dvc repro"
            )
    if not own:
        print(f"merge: {adapter} brings no tokenizer, so the base's is used")
    files = [tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).exists()]
    files += [f for f in base.iterdir() if any(Path(f.name.lower()).match(p) for p in LICENCES)]
    for file in files:
        shutil.copyfile(file, out / file.name)
    config = read_json(base / "config.json")
    for key in ("quantization_config", "torch_dtype"):
        config.pop(key, None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_json(out / "config.json", config, sort_keys=True)
    if (base / "generation_config.json").exists():
        generation = read_json(base / "generation_config.json")
    else:
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = {key: config[key] for key in ids if config.get(key) is not None}
    if ends := end_tokens(out, generation.get("eos_token_id")):
        generation["eos_token_id"] = ends
    write_json(out / "generation_config.json", generation, sort_keys=True)


def end_tokens(folder: Path, known: int | list[int] | None) -> list[int]:
    """The known end tokens and the tokenizer's, which the tuned model ends its answers with."""
    ids = known if isinstance(known, list) else [] if known is None else [known]
    config = read_json(folder / "tokenizer_config.json")
    token = config.get("eos_token")
    token = token["content"] if isinstance(token, dict) else token
    if token is None:
        return ids
    end = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(token)
    return ids if end in ids else [*ids, end]


def read_sources(kind: str) -> tuple[Weights, dict[str, list[str]], dict[str, Update]]:
    """The checked weights to merge onto, the tensors by output file, and the updates by weight."""
    if kind == "dequantized":
        check_sums(QUANTIZED, "quantize")
    # Its configuration, tokenizer and licence go into the merged model in any case.
    check_sums(BASE, "fetch_model", weights=kind == "original")
    check_adapter_sums(ADAPTER)
    base, quantized = Weights(BASE), Weights(QUANTIZED)
    check_layout(base, quantized)
    shards: dict[str, list[str]] = {}
    for name in quantized.names:
        shards.setdefault(base.files[name].name, []).append(name)
    source = quantized if kind == "dequantized" else base
    return source, shards, read_adapter(ADAPTER, quantized.shapes)


def main() -> None:
    params = load_params().merge
    dtype = getattr(torch, params.dtype)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Row blocks are computed side by side: threads within one would only wait for each other.
    torch.set_num_threads(1)
    source, shards, updates = read_sources(params.base)
    print(f"merge: {len(updates)} updates onto {source.folder}, {params.dtype}, {device}")
    sums: dict[str, str] = {}
    with whole_folder(MERGED, sums=sums) as out:
        counts = write_weights(out, source, shards, updates, dtype, device, sums)
        write_companions(out, BASE, ADAPTER, dtype)
        made = {"device": device.type, "adapter_sha256": sha256(ADAPTER / WEIGHTS)}
        write_json(out / "merge.json", params.model_dump() | made | counts, sort_keys=True)
    print(f"merge: wrote {counts['bytes'] / 1e9:.2f} GB to {MERGED}")


if __name__ == "__main__":
    main()
