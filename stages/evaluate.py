"""Score the base and the tuned model on the same held-out tokens, and let both answer some.

    python -m stages.evaluate

Reads data/prepared, models/quantized and models/adapter, writes metrics/eval.json,
metrics/eval_cost.json and metrics/samples.jsonl. The base is loaded once: with the adapter
switched off it is the untouched base.
"""

import json
import math
import random
import time
from pathlib import Path

from stages.shared.libraries import load_libraries
from stages.shared.outputs import GB, check_sums, write_metrics, write_text
from stages.shared.params import load_params
from stages.shared.process import StageError, begin

if __name__ == "__main__":
    begin("evaluate")
    load_libraries("bitsandbytes", "peft")

import torch
from transformers import AutoTokenizer, GenerationConfig

from stages.shared.adapter import check_adapter_sums, read_adapter
from stages.shared.device import memory_metrics, memory_of_ranks, pick_device, reset_peaks
from stages.shared.end_tokens import end_tokens
from stages.shared.launch import on_devices
from stages.shared.model import load_adapter, load_base
from stages.shared.named_base import check_named_base
from stages.shared.paths import ADAPTER, PREPARED, QUANTIZED
from stages.shared.provenance import device_name, provenance
from stages.shared.ranks import ALONE, World
from stages.shared.rows import read_rows, set_sha256
from stages.shared.scoring import Scores, batch_count, perplexity, score
from stages.shared.sets import HELD_OUT, SET_NAMES, held_out_sets
from stages.shared.weights import Weights

RESAMPLES = 2000
ANSWER_TOKENS = 128


def interval(scores: Scores) -> tuple[float, float]:
    """95 % bootstrap interval of the perplexity over rows (Efron 1979), the same on every run."""
    draw = random.Random(0)
    pairs = list(zip(scores.nll, scores.tokens, strict=True))
    found = []
    for _ in range(RESAMPLES):
        sample = draw.choices(pairs, k=len(pairs))
        found.append(perplexity(math.fsum(n for n, _ in sample) / sum(t for _, t in sample)))
    found.sort()
    return found[int(0.025 * RESAMPLES)], found[int(0.975 * RESAMPLES) - 1]


def set_metrics(prefix: str, rows: list[dict], base: Scores, tuned: Scores) -> dict:
    """Flat metrics of one held-out set. Bits per byte compare across tokenizers."""
    scored_bytes = sum(row["scored_bytes"] for row in rows)
    metrics: dict[str, float | str] = {}
    for name, scores in (("base", base), ("tuned", tuned)):
        low, high = interval(scores)
        metrics[f"{prefix}{name}_perplexity"] = scores.perplexity
        metrics[f"{prefix}{name}_perplexity_low"] = low
        metrics[f"{prefix}{name}_perplexity_high"] = high
        bits = math.fsum(scores.nll) / math.log(2)
        metrics[f"{prefix}{name}_bits_per_byte"] = bits / scored_bytes
    metrics[f"{prefix}eval_tokens"] = sum(tuned.tokens)
    metrics[f"{prefix}eval_set_sha256"] = set_sha256(rows)
    return metrics


@torch.no_grad()
def answers(model, tokenizer, rows: list[dict], ends: list[int]) -> list[str]:
    """Greedy answers to the rows' prompts, up to one of `ends` or ANSWER_TOKENS each."""
    prompts = [row["input_ids"][: row["prompt_tokens"]] for row in rows]
    width = max(map(len, prompts))
    # Generation continues at the right end, so prompts are padded on the left.
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    greedy = GenerationConfig(
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        use_cache=True,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    # What is not set there would come from the base's generation_config.json.
    model.get_base_model().generation_config = greedy
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=greedy,
    )
    return tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)


def samples(
    model, tokenizer, sets: dict[str, list[dict]], count: int, ends: list[int]
) -> list[dict]:
    """The first held-out prompts of each set, `count` in all, answered by base and tuned.

    Rows without a prompt (plain text, later parts of a split row) cannot be answered.
    """
    chosen = [
        (SET_NAMES[HELD_OUT[prefix]].removesuffix("s"), row)
        for i, (prefix, rows) in enumerate(sets.items())
        for row in [r for r in rows if r["prompt_tokens"]][: (count + i) // len(sets)]
    ]
    if not chosen:
        return []
    rows = [row for _, row in chosen]
    tuned = answers(model, tokenizer, rows, ends)
    with model.disable_adapter():
        base = answers(model, tokenizer, rows, ends)
    return [
        {
            "row": row["row"],
            "set": name,
            "prompt": tokenizer.decode(row["input_ids"][: row["prompt_tokens"]]),
            "reference": tokenizer.decode(
                row["input_ids"][row["prompt_tokens"] :], skip_special_tokens=True
            ),
            "base": before,
            "tuned": after,
        }
        for (name, row), before, after in zip(chosen, base, tuned, strict=True)
    ]


def main() -> None:
    for folder, stage in ((PREPARED, "prepare"), (QUANTIZED, "quantize")):
        check_sums(folder, stage)
    check_adapter_sums(ADAPTER)
    # Named here what PEFT would load in part or fail on.
    read_adapter(ADAPTER, Weights(QUANTIZED).shapes)
    check_named_base(ADAPTER, QUANTIZED)
    made = on_devices("evaluate", measure, max(map(batch_count, held_out().values())))
    texts = "".join(json.dumps(text) + "\n" for text in made["samples"])
    write_text(Path("metrics/samples.jsonl"), texts)
    write_metrics(Path("metrics/eval.json"), made["metrics"])
    write_metrics(Path("metrics/eval_cost.json"), made["cost"])


def held_out() -> dict[str, list[dict]]:
    """The rows of each held-out set, by the prefix of its metrics."""
    return {prefix: read_rows(file) for prefix, file in held_out_sets().items()}


def measure(world: World, task: dict) -> dict:
    """Load the models, score the sets with the other ranks of `world`, and let rank 0 answer.

    Returns metrics, cost and samples.
    """
    params = load_params()
    sets, device = held_out(), pick_device()
    base = load_base(QUANTIZED, device)
    weights = torch.cuda.memory_allocated() / GB if device.type == "cuda" else None
    model = load_adapter(base, ADAPTER)
    counts = [f"{SET_NAMES[HELD_OUT[prefix]]} ({len(rows)} rows)" for prefix, rows in sets.items()]
    where = device_name(device) + (f", {world.size} ranks" if world.size > 1 else "")
    print(f"evaluate: {', '.join(counts)}, base and tuned, on {where}", flush=True)
    reset_peaks()
    texts = []
    try:
        metrics, cost = evaluate(model, sets, world)
        peaks = world.gather(memory_metrics())
        if world.first:
            # An adapter from elsewhere may bring no tokenizer; the rows were made with this one.
            tokenizer = AutoTokenizer.from_pretrained(PREPARED / "tokenizer")
            ends = end_tokens(PREPARED / "tokenizer")
            texts = samples(model, tokenizer, sets, params.evaluate.samples, ends)
            peaks[0] = memory_metrics()
    except torch.cuda.OutOfMemoryError:
        raise no_memory_to_score(weights or 0.0) from None
    cost |= memory_of_ranks(peaks)
    cost |= {"weights_vram_gb": weights} if weights is not None else {}
    cost = provenance(device) | {"ranks": world.size} | cost
    return {"metrics": metrics, "cost": cost, "samples": texts}


def no_memory_to_score(weights: float) -> StageError:
    """What was allocated when the GPU ran out, and what to change. `weights` in GB."""
    rest = torch.cuda.max_memory_allocated() / GB - weights
    return StageError(
        f"out of GPU memory with {weights + rest:.2f} GB allocated (base model {weights:.2f}, "
        f"adapter and scoring {rest:.2f}); see with nvidia-smi who else uses the GPU, lower "
        "evaluate.samples, or use the CPU: CUDA_VISIBLE_DEVICES= dvc repro evaluate"
    )


def evaluate(model, sets: dict[str, list[dict]], world: World = ALONE) -> tuple[dict, dict]:
    """Quality metrics of every held-out set, and what scoring them cost."""
    metrics: dict[str, float | str] = {}
    tokens, started = 0, time.monotonic()
    for prefix, rows in sets.items():
        tuned = score(model, rows, world=world)
        with model.disable_adapter():
            base = score(model, rows, world=world)
        check_numbers(base, rows, "the base's", "name another model.id")
        check_numbers(tuned, rows, "the tuned model's", "lower train.learning_rate")
        metrics |= set_metrics(prefix, rows, base, tuned)
        tokens += 2 * sum(len(row["input_ids"]) for row in rows)
        print(
            f"evaluate: {SET_NAMES[HELD_OUT[prefix]]}: perplexity {base.perplexity:.2f} base, "
            f"{tuned.perplexity:.2f} tuned, on {sum(tuned.tokens)} tokens",
            flush=True,
        )
    seconds = time.monotonic() - started
    return metrics, {"eval_seconds": seconds, "tokens_per_second": tokens / seconds}


def check_numbers(scores: Scores, rows: list[dict], whose: str, remedy: str) -> None:
    """Raise StageError naming the first of `rows` whose NLL is no number."""
    for row, nll in zip(rows, scores.nll, strict=True):
        if not math.isfinite(nll):
            raise StageError(f"{whose} loss on {row['row']} is {nll}; {remedy}")


if __name__ == "__main__":
    main()
