"""The fast path against the plain one: the loss of 50 steps, and scoring of held-out rows.

    python -m benchmarks.fast_path curve --default DIR   # on one NVIDIA GPU, real weights and rows
    python -m benchmarks.fast_path evaluation            # the same GPU, 7B shape, random weights

    curve        the default's rows in the same order through the train stage's trainer, with the
                 fast path and without: PEFT's layers, padded rows, SDPA attention. The fast path
                 runs twice, to show the difference between equal runs. DIR is a project in which
                 fetch_model and prepare have run.
    evaluation   the scoring of `evaluate` against a plain loop, row by row with all logits. Tokens
                 a second and the allocator's peak, on the same 200 rows.

Writes benchmarks/results/fast_path.json.
"""

import argparse
import json
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
import yaml

from benchmarks.methods import PEFT_ONLY, SHAPE, strategy_path, told, with_changes
from benchmarks.random_models import build, scratch
from benchmarks.speed import random_rows
from benchmarks.vram import LIBRARIES, alone, version
from stages.shared.outputs import GB
from stages.shared.params import PARAMS

RESULTS = Path("benchmarks/results/fast_path.json")
STEPS, ROWS_A_STEP = 50, 4
EVALUATED_ROWS, RANK = 200, 64
SIDES = {"plain": "sdpa", "fast": "auto", "fast again": "auto"}


def losses(side: str, project: Path, device: torch.device) -> tuple[list[float], str]:
    """The loss of every step, and the fast path that was used."""
    from datasets import Dataset, disable_caching
    from transformers import AutoConfig, AutoTokenizer

    from stages.quantize import quantize
    from stages.shared.model import load_base
    from stages.training.building import TrainingSet, build_trainer

    disable_caching()
    prepared = project / "data/prepared"
    rows = Dataset.from_file(str(prepared / "train.arrow")).select_columns(["input_ids", "labels"])
    default = yaml.safe_load((project / PARAMS).read_text(encoding="utf-8"))
    changes = {
        "batching": "shuffle",
        "batch_size": ROWS_A_STEP,
        "gradient_accumulation": 1,
        "gradient_checkpointing": True,
        "attention": SIDES[side],
        "epochs": STEPS * ROWS_A_STEP / len(rows),
    }
    params = with_changes(default, {"train": changes})
    width = json.loads((prepared / "prepared.json").read_text(encoding="utf-8"))["max_length"]
    with tempfile.TemporaryDirectory() as folder:
        quantize(project / "models/base", Path(folder), params.quantize.double_quant)
        config, off = AutoConfig.from_pretrained(folder), PEFT_ONLY if side == "plain" else ()
        fast, placed = strategy_path(params, config, ROWS_A_STEP * width, device, off)
        torch.manual_seed(params.seed)
        model = load_base(Path(folder), device, fast.attention)
    data = TrainingSet(rows, AutoTokenizer.from_pretrained(prepared / "tokenizer"), width)
    trainer = build_trainer(model, data, params, fast, placed, scratch())
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return found, told(fast, placed)


def curve(project: Path, device: torch.device) -> dict:
    found = {side: alone(losses, side, project, device) for side in SIDES}
    plain, fast, again = (values for values, _ in found.values())

    def apart(a: list[float], b: list[float]) -> dict[str, float]:
        distances = [abs(x - y) for x, y in zip(a, b, strict=True)]
        return {"mean_nats": sum(distances) / len(distances), "largest_nats": max(distances)}

    return {
        "steps": len(fast),
        "from_plain": apart(fast, plain),
        "from_itself": apart(fast, again),
        "losses": {side: values for side, (values, _) in found.items()},
        "fast_path": {side: text for side, (_, text) in found.items()},
    }


def plain_loop(model, rows: list[dict]) -> float:
    """Mean NLL of all tokens, as computed in a typical notebook."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=model.device)
        enabled = model.device.type == "cuda"
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=enabled):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        total += loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


def evaluation(device: torch.device) -> dict:
    from peft import get_peft_model

    from stages.shared.params import load_params
    from stages.shared.scoring import score
    from stages.training.settings import lora_config

    lora = {"r": RANK, "alpha": RANK, "target_modules": "all-linear"}
    params = with_changes(load_params().model_dump(), {"lora": lora})
    model = get_peft_model(build(SHAPE, True, device), lora_config(params.lora)).eval()
    rows = [{"input_ids": ids, "labels": ids} for ids in random_rows(EVALUATED_ROWS)]
    tokens = sum(len(row["input_ids"]) for row in rows)

    def scored(model, rows):
        scores = score(model, rows)
        return sum(scores.nll) / sum(scores.tokens)

    found = {"rows": len(rows), "tokens": tokens}
    for side, run in (("stage", scored), ("plain loop", plain_loop)):
        run(model, rows[:8])
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        loss = run(model, rows)
        seconds = time.monotonic() - started
        found[side] = {
            "tokens_per_second": tokens / seconds,
            "peak_gb": torch.cuda.max_memory_allocated() / GB,
            "nll": loss,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("curve", "evaluation"))
    parser.add_argument("--default", type=Path, default=Path("."), help="its project folder")
    options = parser.parse_args()
    device = torch.device("cuda", 0)
    part = curve(options.default, device) if options.part == "curve" else evaluation(device)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results |= {
        options.part: {
            "device": torch.cuda.get_device_name(),
            "date": datetime.now(UTC).date().isoformat(),
            "versions": {name: version(name) for name in LIBRARIES},
        }
        | part
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in part.items() if k != "losses"}, indent=1))


if __name__ == "__main__":
    main()
