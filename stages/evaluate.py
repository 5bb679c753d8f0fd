"""Score the base and the tuned model on the same held-out tokens, and sample answers of both.

    python -m stages.evaluate

Reads data/prepared, data/retention, models/quantized and models/adapter, writes metrics/eval.json,
metrics/answers.json, metrics/rows.csv, metrics/eval_cost.json and metrics/samples.jsonl. The base
is loaded once and scored with the adapter disabled.
"""

import json
import math
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stages.shared.libraries import load_libraries
from stages.shared.outputs import GB, check_sums, read_json, write_metrics, write_text
from stages.shared.params import Evaluate, load_params
from stages.shared.process import StageError, begin

if __name__ == "__main__":
    begin("evaluate")
    load_libraries("bitsandbytes", "peft")

import torch
from transformers import AutoTokenizer

from stages.evaluating.answers import Answered, answer_metrics, answered, sample
from stages.evaluating.generation import Room, answering_bytes
from stages.evaluating.perplexity import set_metrics
from stages.evaluating.retention import PREFIX, forgetting, retention_rows
from stages.evaluating.row_scores import rows_csv
from stages.shared.adapter import check_adapter_sums, read_adapter, rows_needed
from stages.shared.device import memory_metrics, memory_of_ranks, pick_device, reset_peaks
from stages.shared.embeddings import extend
from stages.shared.end_tokens import end_tokens
from stages.shared.launch import on_devices
from stages.shared.model import load_adapter
from stages.shared.named_base import check_named_base
from stages.shared.own_logits import check_head
from stages.shared.paths import ADAPTER, PREPARED, QUANTIZED, RETENTION
from stages.shared.provenance import device_name, provenance
from stages.shared.ranks import ALONE, World
from stages.shared.rows import read_rows
from stages.shared.scored_model import load_to_score, model_sizes
from stages.shared.scoring import Scores, batch_count, score
from stages.shared.sets import held_out_sets, set_name, stem_of
from stages.shared.streaming import Streamer
from stages.shared.text_model import positions_of, read_config
from stages.shared.weights import model_weights

METRICS = Path("metrics")
INPUTS = {PREPARED: "prepare", QUANTIZED: "quantize", RETENTION: "fetch_retention"}
# Libraries whose version may change the scores of answers.
SCORERS = ("sacrebleu", "rapidfuzz")


def main() -> None:
    for folder, stage in INPUTS.items():
        check_sums(folder, stage)
    check_adapter_sums(ADAPTER)
    # Named here what PEFT would load in part or fail on.
    read_adapter(ADAPTER, model_weights(QUANTIZED).shapes, QUANTIZED)
    check_named_base(ADAPTER, QUANTIZED)
    made = on_devices("evaluate", measure, max(map(batch_count, held_out().values())))
    lines = (json.dumps(one) + "\n" for one in made["samples"])
    write_text(METRICS / "samples.jsonl", "".join(lines))
    write_metrics(METRICS / "answers.json", made["answers"])
    write_metrics(METRICS / "eval.json", made["metrics"])
    write_text(METRICS / "rows.csv", made["rows"])
    write_metrics(METRICS / "eval_cost.json", made["cost"])


def name_of(prefix: str) -> str:
    return "texts of another domain" if prefix == PREFIX else set_name(stem_of(prefix))


def held_out() -> dict[str, list[dict]]:
    """Metric prefix -> rows of the held-out set."""
    return {prefix: read_rows(file) for prefix, file in held_out_sets().items()}


def measure(world: World, task: dict) -> dict:
    """Load the models, score the sets on all ranks of `world`, and sample answers on rank 0.

    Returns the contents of the stage's files: metrics, answers, rows, samples and cost.
    """
    params = load_params()
    # The rows were made with this tokenizer; an adapter from elsewhere may have none.
    tokenizer = AutoTokenizer.from_pretrained(PREPARED / "tokenizer")
    tokens = params.retention.tokens if params.retention else 0
    texts = retention_rows(RETENTION, tokenizer, tokens, positions_of(read_config(QUANTIZED)))
    sets, device = held_out(), pick_device()
    scored = sets | ({PREFIX: texts} if texts else {})
    longest = max(len(row["input_ids"]) for rows in scored.values() for row in rows)
    sizes = model_sizes(QUANTIZED, longest, device, ADAPTER)
    answers = answering_bytes(sizes, sets, params.evaluate)
    # Each set is scored twice.
    passes = 2 * len(scored) + 2 * params.evaluate.samples
    base, streamer = load_to_score("evaluate", QUANTIZED, sizes, device, world, answers, passes)
    # As train began: spare rows of a checkpoint hold anything.
    needed, added = (
        rows_needed(ADAPTER),
        read_json(PREPARED / "prepared.json").get("new_tokens", {}),
    )
    extend(base, needed, [id for id in added.values() if id < needed])
    if not streamer:
        # With streamed weights each row would cost a pass over them, and train has tried it.
        check_head(base, [row["input_ids"] for row in sets[""]])
    weights = torch.cuda.memory_allocated() / GB if device.type == "cuda" else None
    model = load_adapter(base, ADAPTER)
    counts = [f"{name_of(prefix)} ({len(rows)} rows)" for prefix, rows in scored.items()]
    where = device_name(device) + (f", {world.size} ranks" if world.size > 1 else "")
    print(f"evaluate: {', '.join(counts)}, base and tuned, on {where}", flush=True)
    reset_peaks()
    found: list[Answered] = []
    try:
        metrics, scores, cost = evaluate(model, scored, world, streamer)
        peaks = world.gather(memory_metrics())
        if world.first:
            kind: Any = type(base)
            chunks = not base._is_stateful and kind._supports_default_dynamic_cache()
            room = Room(streamer, sizes, chunks) if streamer else None
            found, answer_cost = answer(model, tokenizer, sets, params.evaluate, room)
            cost |= answer_cost
            peaks[0] = memory_metrics()
    except torch.cuda.OutOfMemoryError:
        raise no_memory_to_score(weights or 0.0) from None
    cost |= memory_of_ranks(peaks)
    cost |= {"weights_vram_gb": weights} if weights is not None else {}
    scorers = {f"{name}_version": version(name) for name in SCORERS}
    cost |= {"streamed_layers": streamer.count} if streamer else {}
    return {
        "metrics": metrics,
        "answers": answer_metrics(found),
        "rows": rows_csv(scores, found),
        "samples": [sample(one) for one in found],
        "cost": provenance(device) | scorers | {"ranks": world.size} | cost,
    }


def no_memory_to_score(weights: float) -> StageError:
    """What was allocated when memory ran out, and what to change. `weights` in GB."""
    rest = torch.cuda.max_memory_allocated() / GB - weights
    return StageError(
        f"out of GPU memory with {weights + rest:.2f} GB allocated (base model {weights:.2f}, "
        f"adapter and scoring {rest:.2f}); see with nvidia-smi what else uses the GPU, lower "
        "evaluate.samples, or use the CPU: CUDA_VISIBLE_DEVICES= dvc repro evaluate"
    )


def evaluate(
    model,
    sets: dict[str, list[dict]],
    world: World = ALONE,
    streamer: Streamer | None = None,
) -> tuple[dict, dict[str, dict[str, Scores]], dict]:
    """Quality metrics of all sets, scores of their rows, and the cost of scoring."""
    metrics: dict[str, float | str] = {}
    scores: dict[str, dict[str, Scores]] = {}
    tokens, started = 0, time.monotonic()
    for prefix, rows in sets.items():
        tuned = score(model, rows, world=world, streamer=streamer)
        with model.disable_adapter():
            base = score(model, rows, world=world, streamer=streamer)
        check_numbers(base, rows, "the base's", "name another model.id")
        check_numbers(tuned, rows, "the tuned model's", "lower train.learning_rate")
        metrics |= set_metrics(prefix, rows, base, tuned)
        scores[prefix] = {"base": base, "tuned": tuned}
        tokens += 2 * sum(len(row["input_ids"]) for row in rows)
        print(
            f"evaluate: {name_of(prefix)}: perplexity {base.perplexity:.2f} base, "
            f"{tuned.perplexity:.2f} tuned, on {sum(tuned.tokens)} tokens",
            flush=True,
        )
    metrics |= forgetting(metrics)
    seconds = time.monotonic() - started
    return metrics, scores, {"eval_seconds": seconds, "tokens_per_second": tokens / seconds}


def answer(
    model,
    tokenizer,
    sets: dict[str, list[dict]],
    params: Evaluate,
    room: Room | None = None,
) -> tuple[list[Answered], dict]:
    """Held-out prompts answered by both models, and the cost."""
    ends = end_tokens(PREPARED / "tokenizer")
    started = time.monotonic()
    found = answered(model, tokenizer, sets, params, ends, room)
    seconds = time.monotonic() - started
    tokens = sum(one.tokens for each in found for one in each.answers.values())
    if not found:
        return found, {}
    print(f"evaluate: {len(found)} prompts answered twice in {seconds:.0f} s", flush=True)
    return found, {"answer_seconds": seconds, "answer_tokens_per_second": tokens / seconds}


def check_numbers(scores: Scores, rows: list[dict], whose: str, remedy: str) -> None:
    """Raise StageError naming the first of `rows` whose NLL is not finite."""
    for row, nll in zip(rows, scores.nll, strict=True):
        if not math.isfinite(nll):
            raise StageError(f"{whose} loss on {row['row']} is {nll}; {remedy}")


if __name__ == "__main__":
    main()
