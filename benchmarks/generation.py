"""Batched answers of the evaluate stage against a loop of `generate`, row by row.

    python -m benchmarks.generation speed                   # one NVIDIA GPU, random weights
    python -m benchmarks.generation answers --default DIR   # the same or a CPU, real weights

    speed      100 prompts of different lengths answered by an NF4 base of Mistral-7B's shape with
               its adapter, and the first 12 of them row by row: tokens a second and the
               allocator's peak of both ways, and how many answers differ. Random weights make
               nearly every choice of a token a close one, so far more differ than of a trained
               model.
    answers    the default's own held-out prompts, base and tuned: how many of 100 answers differ
               between the two ways. DIR is a project in which prepare, quantize and train have run.

Writes benchmarks/results/generation.json.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.vram import LIBRARIES, version
from stages.shared.outputs import GB

RESULTS = Path("benchmarks/results/generation.json")
SHAPE, RANK = "mistral-7b", 64
PROMPTS, ALONE, SHORTEST, LONGEST, TOKENS, SEED = 100, 12, 30, 400, 64, 11
Answers = list[list[int]]


class Ids:
    """A tokenizer whose text is the ids themselves."""

    @staticmethod
    def decode(ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def batched(model, prompts: Answers, ends: list[int], limit: int) -> Answers:
    from stages.evaluating.generation import answers

    found = answers(model, Ids, prompts, ends, limit)
    return [list(map(int, answer.text.split())) for answer in found]


@torch.no_grad()
def row_by_row(model, prompts: Answers, ends: list[int], limit: int) -> Answers:
    """As in a typical notebook."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=limit,
            do_sample=False,
            use_cache=True,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
        )
        new = output[0, len(prompt) :].tolist()
        end = next((i for i, token in enumerate(new) if token in ends), None)
        found.append(new[:end])
    return found


def differing(one: Answers, other: Answers) -> dict:
    """How many answers differ, and after how many equal tokens on average."""
    first = [
        next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), None)
        for a, b in zip(one, other, strict=True)
        if a != b
    ]
    known = [place for place in first if place is not None]
    return {
        "answers": len(one),
        "differ": len(first),
        "mean_equal_tokens_before": sum(known) / len(known) if known else None,
    }


def timed(run: Callable, model, prompts: Answers, ends: list[int], limit: int) -> tuple:
    """The answers of `run`, its tokens a second, and its peak memory on a GPU."""
    run(model, prompts[:4], ends, 8)
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    found = run(model, prompts, ends, limit)
    seconds = time.monotonic() - started
    rate = sum(map(len, found)) / seconds
    print(f"generation: {len(prompts)} prompts in {seconds:.1f} s", flush=True)
    peak = {"peak_gb": torch.cuda.max_memory_allocated() / GB} if cuda else {}
    return found, {"seconds": seconds, "tokens_per_second": rate} | peak


def speed(device: torch.device) -> dict:
    from peft import get_peft_model

    from benchmarks.methods import with_changes
    from benchmarks.random_models import build
    from stages.shared.params import load_params
    from stages.training.settings import lora_config

    lora = {"r": RANK, "alpha": RANK, "target_modules": "all-linear"}
    params = with_changes(load_params().model_dump(), {"lora": lora})
    model = get_peft_model(build(SHAPE, True, device), lora_config(params.lora)).eval()
    draw = random.Random(SEED)
    lengths = [draw.randrange(SHORTEST, LONGEST) for _ in range(PROMPTS)]
    prompts = [[1, *draw.choices(range(3, 32000), k=length)] for length in lengths]
    # No end token: both ways write the same number of tokens.
    fast, found = timed(batched, model, prompts, [], TOKENS)
    slow, plain = timed(row_by_row, model, prompts[:ALONE], [], TOKENS)
    return {
        "stage": found | {"prompts": PROMPTS},
        "row by row": plain | {"prompts": ALONE},
        "times": found["tokens_per_second"] / plain["tokens_per_second"],
        "different": differing(fast[:ALONE], slow),
    }


def real(options: argparse.Namespace, device: torch.device) -> dict:
    from stages.shared.end_tokens import end_tokens
    from stages.shared.model import load_adapter, load_base
    from stages.shared.params import load_params
    from stages.shared.paths import ADAPTER, PREPARED, QUANTIZED
    from stages.shared.rows import read_rows

    project = options.default
    model = load_adapter(load_base(project / QUANTIZED, device), project / ADAPTER)
    rows = read_rows(project / PREPARED / "eval.arrow")[: options.prompts]
    prompts = [row["input_ids"][: row["prompt_tokens"]] for row in rows if row["prompt_tokens"]]
    ends = end_tokens(project / PREPARED / "tokenizer")
    limit = load_params(project / "params.yaml").evaluate.max_answer_tokens
    found = {}
    for who in ("tuned", "base"):
        with nullcontext() if who == "tuned" else model.disable_adapter():
            fast, stage = timed(batched, model, prompts, ends, limit)
            slow, plain = timed(row_by_row, model, prompts, ends, limit)
        found[who] = {"stage": stage, "row by row": plain, "different": differing(fast, slow)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("speed", "answers"))
    parser.add_argument("--default", type=Path, default=Path("."), help="its project folder")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="of the part answers")
    options = parser.parse_args()
    from stages.shared.device import pick_device
    from stages.shared.provenance import device_name

    device = pick_device()
    part = speed(device) if options.part == "speed" else real(options, device)
    name = options.part if device.type == "cuda" else f"{options.part} on the CPU"
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results[name] = {
        "device": device_name(device),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {library: version(library) for library in LIBRARIES},
    } | part
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(part, indent=1))


if __name__ == "__main__":
    main()
