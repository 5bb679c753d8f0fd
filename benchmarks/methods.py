"""Full fine-tuning, 16-bit LoRA and QLoRA on the same rows at 7B shape: the table that circulates.

    python -m benchmarks.methods measure     # on one NVIDIA GPU of 140 GB
    python -m benchmarks.methods report      # anywhere: the table and the picture

Mistral-7B's shape with random weights: memory and time are real, perplexity would mean nothing.
1,000 rows, log-normal in length like guanaco's (benchmarks/speed.py), four a step, checkpointing
on. Peaks are those of a run over the longest rows; the time of an epoch is that of its tokens at
the rate of STEPS steps over rows drawn at random. Also what each form of the weights takes right
after loading, in bits for each parameter that quantization changes.
Writes benchmarks/results/methods.json, methods.md and methods.svg.
"""

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.random_models import build, config_of
from benchmarks.speed import random_rows, row_lengths
from benchmarks.vram import LIBRARIES, ROWS_A_STEP, Meter, Point, prepare, version
from stages.shared import vram
from stages.shared.shapes import shape_of

FOLDER = Path("benchmarks/results")
RESULTS = FOLDER / "methods.json"
SHAPE = "mistral-7b"
RANK = 64
ROWS = 1000
STEPS, WARM_STEPS = 40, 5
METHODS = {"full": "full fine-tuning, bf16", "lora": "LoRA, 16 bit", "qlora": "QLoRA, NF4"}
# What is quoted from page to page, without a source: GB for 7B.
QUOTED_GB = {"full": 56, "lora": 28, "qlora": 11}
LOADED = {"bf16": (False, True), "nf4": (True, False), "nf4, double quantization": (True, True)}


def dataset(rows: list[list[int]]):
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def timed_steps(trainer) -> float:
    """Tokens a second of the trainer's steps after the first WARM_STEPS."""
    from transformers import TrainerCallback

    marks = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            torch.cuda.synchronize()
            marks.append((time.monotonic(), trainer.tokens))

    trainer.add_callback(Clock())
    trainer.train()
    (begun, before), (ended, after) = marks[WARM_STEPS - 1], marks[-1]
    return (after - before) / (ended - begun)


def measure_method(method: str, meter: Meter, device: torch.device) -> dict:
    """Peak and time of one method on the same rows."""
    rows = random_rows(ROWS)
    longest = sorted(rows, key=len)[-2 * ROWS_A_STEP :]
    tokens = sum(map(len, longest[ROWS_A_STEP:]))
    point = Point(SHAPE, method, RANK if method != "full" else 0, tokens)
    meter.start()
    trainer, _ = prepare(point, device, dataset(longest[ROWS_A_STEP:] * 2))
    trainer.train()
    found = meter.stop(trainer)
    del trainer
    meter.start()
    trainer, fast = prepare(point, device, dataset(rows[: STEPS * ROWS_A_STEP]))
    rate = timed_steps(trainer)
    del trainer
    seconds = sum(row_lengths(ROWS)) / rate
    print(f"methods: {method}: {found['measured_gb']:.2f} GB, {seconds:.0f} s an epoch ({fast})")
    return found | {
        "method": method,
        "longest_step_tokens": tokens,
        "tokens_per_second": rate,
        "seconds_per_epoch": seconds,
        "fast_path": str(fast),
        "quoted_gb": QUOTED_GB[method],
        "cards_gb": vram.fitting_cards(found["measured_device_gb"] * vram.GB),
    }


def measure_loading(name: str, meter: Meter, device: torch.device) -> dict:
    """Bytes on the device right after a model is there, before anything is computed."""
    quantized, double_quant = LOADED[name]
    meter.start()
    before = torch.cuda.memory_allocated()
    model = build(SHAPE, quantized, device, double_quant=double_quant)
    loaded = torch.cuda.memory_allocated() - before
    shape = shape_of(config_of(SHAPE))
    linear = sum(x.parameters for x in shape.linears)
    del model
    return {
        "weights": name,
        "loaded_gb": loaded / vram.GB,
        "bits_per_quantized_parameter": (loaded - 2 * shape.other_parameters) * 8 / linear,
        "bits_per_parameter": loaded * 8 / shape.parameters,
    }


def measure() -> None:
    from datasets import disable_caching

    disable_caching()
    device, meter = torch.device("cuda", 0), Meter()
    results = {
        "device": torch.cuda.get_device_name(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in LIBRARIES},
        "shape": SHAPE,
        "rank": RANK,
        "rows": ROWS,
        "tokens": sum(row_lengths(ROWS)),
        "loading": [measure_loading(name, meter, device) for name in LOADED],
        "methods": [measure_method(method, meter, device) for method in ("qlora", "lora", "full")],
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def markdown(results: dict) -> str:
    """The two tables."""
    lines = [
        f"7B shape, {results['rows']} rows of {results['tokens']} tokens, {ROWS_A_STEP} a step, "
        f"rank {results['rank']}, on {results['device']}, {results['date']}.",
        "",
        "| method | quoted | allocated | the card must have | fits (GB) | 1,000 rows |",
        "|---|--:|--:|--:|---|--:|",
    ]
    for found in results["methods"]:
        cards = ", ".join(map(str, found["cards_gb"])) or "none of 80 or less"
        lines.append(
            f"| {METHODS[found['method']]} | ~{found['quoted_gb']} GB | {found['measured_gb']:.1f} "
            f"GB | {found['measured_device_gb']:.1f} GB | {cards} "
            f"| {found['seconds_per_epoch']:.0f} s |"
        )
    lines += ["", "| weights | after loading | bits a quantized parameter | bits a parameter |"]
    lines.append("|---|--:|--:|--:|")
    for found in results["loading"]:
        lines.append(
            f"| {found['weights']} | {found['loaded_gb']:.2f} GB "
            f"| {found['bits_per_quantized_parameter']:.3f} | {found['bits_per_parameter']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def picture(results: dict) -> str:
    """An SVG of bars: what is quoted beside what was measured."""
    import vl_convert

    values = [
        {"method": METHODS[found["method"]], "what": what, "gb": found[field]}
        for found in results["methods"]
        for what, field in (("quoted", "quoted_gb"), ("measured", "measured_device_gb"))
    ]
    spec = {
        "width": 420,
        "height": 180,
        "background": "white",
        "data": {"values": values},
        "mark": "bar",
        "encoding": {
            "y": {"field": "method", "title": None, "sort": list(METHODS.values())},
            "yOffset": {"field": "what", "sort": ["quoted", "measured"]},
            "x": {"field": "gb", "type": "quantitative", "title": "GB that the card must have"},
            "color": {
                "field": "what",
                "title": None,
                "sort": ["quoted", "measured"],
                "scale": {"range": ["#b8bcc4", "#1f6feb"]},
            },
        },
    }
    return vl_convert.vegalite_to_svg(spec, vl_version="6.4")


def report() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    (FOLDER / "methods.md").write_text(markdown(results), encoding="utf-8")
    (FOLDER / "methods.svg").write_text(picture(results), encoding="utf-8")
    print(markdown(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("measure", "report"))
    {"measure": measure, "report": report}[parser.parse_args().command]()


if __name__ == "__main__":
    main()
