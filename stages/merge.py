"""Merge the adapter into the base's weights, tensor by tensor, as a standalone 16-bit model.

    python -m stages.merge

Reads models/quantized (`merge.base: dequantized`) or models/base (`original`) and models/adapter.
Writes models/merged: safetensors files named as the base's, the files for serving (config,
generation config, tokenizer, chat template, licence), and merge.json, a record of the merge. If the
adapter has no tokenizer, that of data/prepared is used.
"""

import time
from pathlib import Path
from typing import NamedTuple

from stages.shared.libraries import load_libraries
from stages.shared.outputs import (
    check_space,
    check_sums,
    read_json,
    whole_folder,
    write_json,
    write_metrics,
)
from stages.shared.params import load_params
from stages.shared.paths import ADAPTER, BASE, MERGED, PREPARED, QUANTIZED
from stages.shared.process import StageError, begin

if __name__ == "__main__":
    begin("merge")
    from stages.shared.adapter_config import adapts_parameters

    # Only a tokenizer is asked of it, but for LoRA on experts the names of their tensors.
    load_libraries("transformers", without=[] if adapts_parameters(ADAPTER) else ["torch"])
    load_libraries("bitsandbytes")

import torch
from tqdm import tqdm

from stages.merging.companions import tokenizer_folder, write_companions
from stages.merging.shards import Entry, copied_entry, write_shard
from stages.shared.adapter import (
    Change,
    check_adapter_sums,
    read_adapter,
    rows_needed,
)
from stages.shared.adapter_record import adapter_record
from stages.shared.device import memory_metrics, pick_device
from stages.shared.embeddings import has_own_head
from stages.shared.merging import check_rounding, merged_rows, merged_shape
from stages.shared.named_base import check_named_base
from stages.shared.provenance import provenance
from stages.shared.weights import (
    INDEX,
    LETTERS,
    SINGLE,
    Weights,
    kept_names,
    model_weights,
    other_names,
)

COST = Path("metrics/merge_cost.json")


class Sources(NamedTuple):
    """What is merged: weights, names of all tensors by file of the result, updates by name, the
    base, and what is copied from it: other towers than the language model, what belongs to no
    module, and what keeps its type."""

    weights: Weights
    shards: dict[str, list[str]]
    updates: dict[str, Change]
    base: Weights
    copied: set[str]


def check_quantized(base: Weights, quantized: Weights) -> None:
    """The quantized tensors must be the base's: names and shapes. Raises StageError."""
    for name in quantized.names:
        if base.shapes.get(name) != quantized.shapes[name]:
            raise StageError(
                f"{quantized.folder}: {name} has shape {quantized.shapes[name]} and in the base "
                f"{base.shapes.get(name)}; repair it with: python -m tools.repair quantize"
            )
    kept = kept_names(quantized.folder)
    if missing := sorted(kept - set(base.names)):
        raise StageError(
            f"{quantized.folder}: {missing[0]} is not in the base; repair it with: "
            "python -m tools.repair quantize"
        )
    if other_names(quantized.folder) is not None:
        return  # Of a checkpoint with further towers all that quantize found names for is there.
    config = read_json(base.folder / "config.json")
    for name in sorted(set(base.names) - set(quantized.names) - kept):
        # transformers leaves these out when it saves: it has them from elsewhere.
        tied = name == "lm_head.weight" and config.get("tie_word_embeddings")
        if not tied and not name.endswith("rotary_emb.inv_freq"):
            raise StageError(f"{quantized.folder} lacks {name} of the base (fused or renamed?)")


def write_weights(
    out: Path, sources: Sources, dtype: torch.dtype, device: torch.device, sums: dict[str, str]
) -> dict:
    """Stream the merged tensors into `out`, in the base's files.

    Returns the counts for merge.json and puts the files' SHA-256 into `sums`. Raises StageError
    naming a tensor that `dtype` cannot hold.
    """
    weights, base = sources.weights, sources.base
    entries = {
        name: copied_entry(base, name)
        if name in sources.copied
        else Entry(LETTERS[dtype], merged_shape(weights, name, sources.updates.get(name)))
        for names in sources.shards.values()
        for name in names
    }
    total = sum(entry.nbytes for entry in entries.values())
    check_space(out.parent, total, "the merged model")
    flushed: dict[str, int] = {}
    with tqdm(total=total / 1e9, unit="GB", desc="merge", disable=None) as bar:

        def stream(names: list[str]):
            for name in names:
                if name in sources.copied:
                    yield base.read(name)
                    continue
                blocks = merged_rows(weights, name, sources.updates.get(name), dtype, device)
                for values in check_rounding(name, blocks, flushed):
                    yield values
                    bar.update(values.nbytes / 1e9)

        for file, names in sources.shards.items():
            of_file = {base.key(name): entries[name] for name in names}
            sums[file] = write_shard(out / file, of_file, stream(names))
    if list(sources.shards) != [SINGLE]:
        places = {base.key(n): file for file, names in sources.shards.items() for n in names}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(out / INDEX, index, sort_keys=True)
    return {
        "tensors": len(entries),
        "updated_tensors": len(sources.updates),
        "bytes": total,
        "flushed_to_zero": sum(flushed.values()),
    }


def read_sources(kind: str) -> Sources:
    """The checked sources; `kind` says onto which base, as `merge.base` does."""
    if kind == "dequantized":
        check_sums(QUANTIZED, "quantize")
    # Its configuration, tokenizer and licence go into the merged model in any case.
    check_sums(BASE, "fetch_model", weights=kind == "original")
    check_adapter_sums(ADAPTER)
    renamed = other_names(QUANTIZED)
    base, quantized = Weights(BASE, renamed), model_weights(QUANTIZED)
    check_quantized(base, quantized)
    copied = set() if renamed is None else set(base.names) - set(quantized.names)
    copied |= kept_names(QUANTIZED)
    updates = read_adapter(ADAPTER, quantized.shapes, QUANTIZED)
    if lost := sorted(updates.keys() & copied):
        raise StageError(
            f"{ADAPTER}: changes {lost[0]}, which stays as it is in the base; train without it in "
            "lora.target_modules"
        )
    shards: dict[str, list[str]] = {}
    for name in sorted({*quantized.names, *copied}):
        shards.setdefault(base.files[name].name, []).append(name)
    check_named_base(ADAPTER, BASE)
    weights = quantized if kind == "dequantized" else base
    return Sources(weights, shards, updates, base, copied)


def main() -> None:
    started, params = time.monotonic(), load_params().merge
    dtype = getattr(torch, params.dtype)
    device = pick_device()
    # Row blocks are computed side by side: threads within one would only wait for each other.
    torch.set_num_threads(1)
    sources = read_sources(params.base)
    sums: dict[str, str] = {}
    tokenizer = tokenizer_folder(ADAPTER, PREPARED)
    where = f"{sources.weights.folder}, {params.dtype}, {device}"
    print(f"merge: {len(sources.updates)} updates onto {where}")
    if sources.base.mxfp4:
        print(f"merge: the base's experts are in MXFP4; the merge is {params.dtype} throughout")
    with whole_folder(MERGED, sums=sums) as out:
        counts = write_weights(out, sources, dtype, device, sums)
        rows, own_head = rows_needed(ADAPTER), has_own_head(BASE, QUANTIZED)
        write_companions(out, BASE, tokenizer, dtype, rows, own_head)
        record = params.model_dump() | adapter_record(ADAPTER) | counts
        write_json(out / "merge.json", record, sort_keys=True)
    cost = {"merge_seconds": time.monotonic() - started} | memory_metrics()
    write_metrics(COST, provenance(device) | cost)
    print(f"merge: wrote {counts['bytes'] / 1e9:.2f} GB to {MERGED}")


if __name__ == "__main__":
    main()
