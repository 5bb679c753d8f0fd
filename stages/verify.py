"""Decide whether the merged model may be shipped: hold it against the base with the adapter.

    python -m stages.verify

Reads models/merged, models/quantized, models/base, models/adapter and data/prepared. Writes
models/verify.ok and metrics/verify.json, and only when every check has passed:
- tensor names, shapes and types are the base's and `merge.dtype`, and so is config.json;
- every tensor is what PEFT itself computes for it, within one rounding;
- transformers loads the folder with no key missing or left over, and its tokenizer gives the ids
  that were trained on and evaluated;
- on the held-out rows perplexity is within `verify.max_perplexity_change_percent` of the base
  with the adapter, and no value overflows.
"""

import gc
import math
import tempfile
from pathlib import Path

from stages.shared.libraries import load_libraries
from stages.shared.outputs import check_sums, read_json, write_metrics, write_text
from stages.shared.params import load_params
from stages.shared.process import StageError, begin, sha256

if __name__ == "__main__":
    begin("verify")
    load_libraries("bitsandbytes", "peft")

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from stages.shared.adapter import WEIGHTS, check_adapter_sums, read_adapter
from stages.shared.merging import merged_rows
from stages.shared.model import GB, load_adapter, load_base, pick_device
from stages.shared.rows import PREPARED, held_out_sets, read_rows
from stages.shared.scoring import TOKENS_PER_BATCH
from stages.shared.weights import Weights
from stages.verifying.agreement import (
    Agreement,
    Reference,
    agreement,
    reference,
    streamed_layers,
    watched_activations,
)
from stages.verifying.tensor_check import AGAIN, check_layout, check_tensors

BASE = Path("models/base")
QUANTIZED = Path("models/quantized")
ADAPTER = Path("models/adapter")
MERGED = Path("models/merged")
VERDICT = Path("models/verify.ok")
METRICS = Path("metrics/verify.json")
FLOAT16_MAX = 65504
# The adapter is an output of train, which would otherwise run again.
TAKEN = "dvc commit --force train && dvc repro"
# Beside the merged weights on a GPU: a batch's activations and logits (7B: 1.1e9 measured).
WORKING_BYTES = 1.5e9


def check_record(folder: Path, kind: str, dtype: str) -> None:
    """The merge must be of these parameters and this adapter. Raises StageError."""
    record = read_json(folder / "merge.json")
    now = {"base": kind, "dtype": dtype, "adapter_sha256": sha256(ADAPTER / WEIGHTS)}
    for key, value in now.items():
        if record[key] != value:
            raise StageError(f"{folder} was merged with {key} {record[key]}, not {value}; {AGAIN}")


def place_for(weights: Weights, longest: int, device: torch.device) -> torch.device:
    """Where a merged model waits: on the GPU if it has room for it, else in host memory.

    longest  tokens of the longest row, which are computed at once
    """
    if device.type == "cpu":
        return device
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    mine = torch.cuda.get_per_process_memory_fraction() * total - torch.cuda.memory_reserved()
    room = min(free, mine)
    needed = sum(2 * math.prod(shape) for shape in weights.shapes.values())
    needed += WORKING_BYTES * max(1, longest / TOKENS_PER_BATCH)
    if needed <= room:
        return device
    print(
        f"verify: the merged model takes {needed / GB:.1f} GB of the {room / GB:.1f} GB that are "
        "free on the GPU; its weights stay in host memory, and layer after layer visits",
        flush=True,
    )
    return torch.device("cpu")


def load_merged(folder: Path, device: torch.device):
    """Load with transformers alone. Raises StageError for a key missing or left over."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", device_map={"": device}, output_loading_info=True
    )
    for kind, keys in report.items():
        if keys:
            raise StageError(f"{folder}: {kind} when loading: {sorted(map(str, keys))[0]}; {AGAIN}")
    model.config.use_cache = False
    return model.eval()


def check_companions(folder: Path, base: Path, dtype: str) -> None:
    """What serving reads beside the weights is there, and config.json is the base's in `dtype`.

    Raises StageError.
    """
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        if not (folder / name).exists():
            raise StageError(f"{folder} lacks {name}; {AGAIN}")
    found, expected = (read_json(f / "config.json") for f in (folder, base))
    for key in ("quantization_config", "torch_dtype"):
        expected.pop(key, None)
    expected["dtype"] = dtype
    for key in sorted(found.keys() | expected.keys()):
        if found.get(key) != expected.get(key):
            raise StageError(
                f"{folder / 'config.json'}: {key} is {found.get(key)} and must be "
                f"{expected.get(key)}; {AGAIN}"
            )


def check_tokenizer(folder: Path, prepared: Path) -> None:
    """The merged model's tokenizer must give the held-out rows' ids. Raises StageError.

    It may know further tokens, as long as each has a row in the embeddings.
    """
    rows = AutoConfig.from_pretrained(folder).get_text_config().vocab_size
    found, expected = (AutoTokenizer.from_pretrained(f).get_vocab() for f in (folder, prepared))
    wrong = [token for token, id in expected.items() if found.get(token) != id]
    wrong += [token for token in found.keys() - expected.keys() if found[token] >= rows]
    if wrong:
        token = min(wrong)
        raise StageError(
            f"{folder}: its tokenizer has {token!r} as {found.get(token)} and that of the held-out "
            f"rows as {expected.get(token)} ({len(wrong)} tokens differ; the embeddings have "
            f"{rows} rows); delete the tokenizer's files from {ADAPTER}, then: {TAKEN}"
        )


def compare(
    model, rows: list[dict], ref: Reference, device: torch.device
) -> tuple[Agreement, float]:
    """Agreement of the merged model as it is, and its largest activation."""
    with watched_activations(model, device) as largest:
        if model.device.type == "cuda":
            return agreement(model, rows, ref, device), float(largest)
        with streamed_layers(model, device, lambda _name, stored: stored):
            return agreement(model, rows, ref, device), float(largest)


def compare_other(
    model,
    rows: list[dict],
    ref: Reference,
    source: Weights,
    shapes: dict,
    device: torch.device,
) -> Agreement:
    """Agreement of the merge on `source`, made in memory in the place of the merged `model`."""
    updates = read_adapter(ADAPTER, shapes)
    dtype = model.dtype

    def merged(name: str, stored: torch.Tensor) -> torch.Tensor:
        if name not in source.shapes:  # an output head tied to the embeddings
            return stored
        rows = merged_rows(source, name, updates.get(name), dtype, device)
        return torch.cat([part.values for part in rows])

    if model.device.type == "cpu":
        with streamed_layers(model, device, merged):
            return agreement(model, rows, ref, device)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(merged(name, parameter.data))
    return agreement(model, rows, ref, device)


def check_scores(metrics: dict, limit: float, dtype: str) -> None:
    """Raise StageError, with the numbers, when the merged model does not predict as the adapter."""
    faults = []
    if metrics["nonfinite_values"]:
        faults.append(f"{metrics['nonfinite_values']} predicted values are NaN or infinite")
    if dtype == "float16" and not metrics["max_activation"] <= FLOAT16_MAX:
        faults.append(
            f"an activation of {metrics['max_activation']:.3g} exceeds float16's {FLOAT16_MAX}; "
            "set merge.dtype: bfloat16"
        )
    if not abs(metrics["perplexity_change_percent"]) <= limit:
        faults.append(
            f"perplexity {metrics['merged_perplexity']:.4f} and with the adapter "
            f"{metrics['adapter_perplexity']:.4f}: {metrics['perplexity_change_percent']:+.2f} % "
            f"(allowed {limit:g} %), mean KL {metrics['mean_kl']:.2g}, top-1 agreement "
            f"{metrics['token_agreement']:.2%}; use merge.base: dequantized, or allow more in "
            "verify.max_perplexity_change_percent"
        )
    if faults:
        raise StageError(f"{MERGED} must not be shipped: {'; '.join(faults)}")


def verify(params, rows: list[dict], device: torch.device) -> dict:
    """All checks, cheapest first. Returns the metrics; raises StageError when one fails."""
    dtype = getattr(torch, params.merge.dtype)
    check_record(MERGED, params.merge.base, params.merge.dtype)
    merged, quantized, base = Weights(MERGED), Weights(QUANTIZED), Weights(BASE)
    check_layout(merged, quantized, base, dtype)
    sources = {"dequantized": quantized, "original": base}
    source = sources.pop(params.merge.base)
    with tempfile.TemporaryFile(dir=MERGED.parent) as cache:
        model = load_adapter(load_base(QUANTIZED, device), ADAPTER)
        check_tensors(merged, model, source, dtype, device)
        ref = reference(model, rows, cache)
        # Only one of the two models is in memory at a time.
        del model
        gc.collect()
        longest = max(len(row["input_ids"]) for row in rows)
        model = load_merged(MERGED, place_for(merged, longest, device))
        result, largest = compare(model, rows, ref, device)
        metrics = {
            "merged_perplexity": result.perplexity,
            "adapter_perplexity": ref.perplexity,
            "perplexity_change_percent": 100 * (result.perplexity / ref.perplexity - 1),
            "mean_kl": result.mean_kl,
            "max_kl": result.max_kl,
            "kl_tokens": result.kl_tokens,
            "token_agreement": result.token_agreement,
            "nonfinite_values": result.nonfinite,
            "max_activation": largest,
        }
        if params.verify.compare_bases and quantized.nf4:
            (other,) = sources.values()
            result = compare_other(model, rows, ref, other, quantized.shapes, device)
            if result.nonfinite:
                print(f"verify: the merge on the other base overflows {params.merge.dtype}")
            else:
                metrics["other_base_perplexity"] = result.perplexity
                metrics["other_base_mean_kl"] = result.mean_kl
    check_scores(metrics, params.verify.max_perplexity_change_percent, params.merge.dtype)
    return metrics


def main() -> None:
    params = load_params()
    device = pick_device()
    # What is damaged on disk is told apart from what was merged wrong: the remedies differ.
    for folder, stage in (
        (BASE, "fetch_model"),
        (QUANTIZED, "quantize"),
        (PREPARED, "prepare"),
        (MERGED, "merge"),
    ):
        check_sums(folder, stage)
    check_adapter_sums(ADAPTER)
    check_companions(MERGED, BASE, params.merge.dtype)
    check_tokenizer(MERGED, PREPARED / "tokenizer")
    rows = read_rows(held_out_sets()[""])
    print(f"verify: {MERGED} against {QUANTIZED} + {ADAPTER}, {len(rows)} rows, on {device}")
    metrics = verify(params, rows, device)
    write_metrics(METRICS, metrics)
    write_text(VERDICT, "verified\n")
    print(
        f"verify: passed: perplexity {metrics['merged_perplexity']:.4f} "
        f"({metrics['perplexity_change_percent']:+.3f} %), mean KL {metrics['mean_kl']:.2g}, "
        f"top-1 agreement {metrics['token_agreement']:.2%}"
    )


if __name__ == "__main__":
    main()
