"""Do two runs of the same parameters give the same bytes on this GPU, and what does it cost?

    python -m benchmarks.determinism --work DIR               # every part, on one NVIDIA GPU
    python -m benchmarks.determinism --work DIR small         # some of them
    python -m benchmarks.determinism --beside OTHER.json      # its results of another GPU

    small       a small model: every batching and optimizer, dropout, attention, with and without
                the trial step, each trained twice and once more with kills and resumes
    pipeline    quantize to verify, twice on the GPU; quantize and merge once more on the CPU
    7b          Mistral-7B's shape, packed, in alternating pairs: with determinism (the default) and
                without (only possible in this benchmark)
    perplexity  the same held-out rows in batches of several sizes

Weights and rows are random. Writes benchmarks/results/determinism.json after every part: `pairs`
(what was compared, whether it was `equal`, and a digest to compare with other machines),
`cost_percent`, `kills`, `kills_equal`. `--beside` adds `two_gpus`: whether `pipeline` gave the same
bytes on the other GPU.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import speed

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/determinism.json"
PARTS = ("small", "pipeline", "7b", "perplexity")
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "liger-kernel")
TRAINED = (
    "models/adapter/adapter_model.safetensors",
    "metrics/train.json",
    "metrics/curve.csv",
)
STAGES = ("fetch_retention", "quantize", "train", "evaluate", "merge", "verify")
SMALL = "small"
SMALL_ROWS, SMALL_EPOCHS = 64, 6.0
# bitsandbytes pages the state of a matrix from 1e5 values on: 128 x 1024 here.
LORA = {"r": 128, "alpha": 128, "dropout": 0.0, "target_modules": "all-linear"}
TRAIN = {
    "epochs": SMALL_EPOCHS,
    "batch_size": 2,
    "gradient_accumulation": 2,
    "learning_rate": 1e-3,
    "schedule": "cosine",
    "batching": "shuffle",
    "gradient_checkpointing": False,
    "optimizer": "adamw_torch_fused",
}
RECOMPUTED = {"gradient_checkpointing": True}
# Name: changes to `train`, to `lora`, and how often a third run is killed.
RUNS = {
    "shuffle": ({}, {}, 2),
    "packing": (RECOMPUTED | {"batching": "packing"}, {}, 2),
    "group_by_length": (RECOMPUTED | {"batching": "group_by_length"}, {}, 1),
    "dropout": ({}, {"dropout": 0.1}, 2),
    "sdpa": ({"attention": "sdpa"}, {}, 1),
    "paged_adamw_32bit": ({"optimizer": "paged_adamw_32bit"}, {}, 1),
    "paged_adamw_8bit": ({"optimizer": "paged_adamw_8bit"}, {}, 1),
}
PAIRS_7B, ROWS_7B = 3, 400
BATCH_TOKENS = (2048, 4096, 8192, 16384)


def run(work: Path, stage: str, **env: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"stages.{stage}"],
        cwd=work,
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{work}: {stage} failed:\n{done.stdout}\n{done.stderr}")


def write_params(work: Path, **sections: dict) -> None:
    import yaml

    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["retention"] = None
    for section, values in sections.items():
        params[section] |= values
    (work / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")


def make(work: Path, shape: str, rows: int) -> None:
    """Write random 16-bit weights of a shape of random_models.SHAPES, and rows."""
    from benchmarks.random_models import SHAPES, write_base
    from stages.shared.device import pick_device

    if work.exists():
        return
    speed.make_tokenizer(work / "models/base", SHAPES[shape].vocabulary)
    write_base(shape, work / "models/base", pick_device())
    speed.make_workspace(work, rows)


def digest(path: Path) -> str:
    """A hash of a file, or of a folder's names and contents."""
    from stages.shared.process import sha256

    if path.is_file():
        return sha256(path)
    return (path / "SHA256SUMS").read_text(encoding="utf-8")


def short(digest: str) -> str:
    """A shortened digest, to compare with another GPU of the same model."""
    return hashlib.sha256(digest.encode()).hexdigest()[:16]


def outcome(work: Path, names: tuple[str, ...]) -> dict[str, str]:
    return {name: digest(work / name) for name in names}


def killed(work: Path, kills: int, seed: int) -> int:
    """Train in `work` with SIGKILLs at random moments after the first checkpoint; their number."""
    draw, hit = random.Random(seed), 0
    while hit < kills:
        shutil.rmtree(work / "models/adapter", ignore_errors=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "stages.train"],
            cwd=work,
            env=os.environ | {"CHECKPOINT_SECONDS": "0.5"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        before = set((work / "checkpoints").glob("*/checkpoint-*"))
        while process.poll() is None and not (
            set((work / "checkpoints").glob("*/checkpoint-*")) - before
        ):
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 1.5))
        if process.poll() is not None:
            raise RuntimeError(f"{work}: training ended before kill {hit + 1}")
        process.send_signal(signal.SIGKILL)
        process.wait()
        hit += 1
    run(work, "train")
    return hit


def small_run(work: Path, name: str) -> dict:
    changes, adapter, kills = RUNS[name]
    folders = [work.parent / f"{name}-{i}" for i in range(3)]
    for folder in folders:
        shutil.copytree(work, folder)
        write_params(folder, train=TRAIN | changes, lora=LORA | adapter)
    for folder in folders[:2]:
        run(folder, "train")
    hit = killed(folders[2], kills, seed=len(name))
    first, second, third = (outcome(folder, TRAINED) for folder in folders)
    cost = json.loads((folders[0] / "metrics/train_cost.json").read_text(encoding="utf-8"))
    again = json.loads((folders[2] / "metrics/train_cost.json").read_text(encoding="utf-8"))
    return {
        "what": f"small model, {name}: adapter, metrics, curve",
        "equal": first == second,
        "kills": hit,
        "kills_equal": first == third,
        "peak_vram_gb": cost["peak_vram_gb"],
        "peak_vram_gb_resumed": again["peak_vram_gb"],
    }


def small(work: Path) -> dict:
    base = work / "small"
    make(base, SMALL, SMALL_ROWS)
    write_params(base)
    run(base, "quantize")
    with ThreadPoolExecutor(len(RUNS)) as pool:
        pairs = list(pool.map(lambda name: small_run(base, name), RUNS))
    return {"small": pairs}


def pipeline(work: Path) -> dict:
    base = work / "pipeline"
    make(base, SMALL, SMALL_ROWS)
    sections: dict[str, dict] = {
        "train": TRAIN | {"epochs": 1.0},
        "lora": LORA,
        "evaluate": {"samples": 4},
    }
    folders = [work / f"pipeline-{i}" for i in range(3)]
    for folder in folders:
        shutil.copytree(base, folder)
        write_params(folder, **sections)

    def chain(folder: Path) -> None:
        for stage in STAGES:
            run(folder, stage)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(chain, folders[:2]))
    shutil.copytree(folders[0] / "models/adapter", folders[2] / "models/adapter")
    for stage in ("quantize", "merge"):
        run(folders[2], stage, CUDA_VISIBLE_DEVICES="")
    names = (
        "models/quantized",
        "models/adapter",
        "metrics/eval.json",
        "metrics/samples.jsonl",
        "models/merged",
        "metrics/verify.json",
    )
    on_both = ("models/quantized", "models/merged")
    first, second = (outcome(folder, names) for folder in folders[:2])
    host = outcome(folders[2], on_both)
    pairs = [
        {"what": f"two runs: {n}", "equal": first[n] == second[n], "digest": short(first[n])}
        for n in names
    ]
    pairs += [{"what": f"GPU and CPU: {n}", "equal": first[n] == host[n]} for n in on_both]
    return {"pipeline": pairs}


def seven_b(work: Path) -> dict:
    """Alternating runs; the first of each kind is excluded from the rates, since it compiles."""
    base = work / "7b"
    make(base, "mistral-7b", ROWS_7B)
    if not (base / "models/quantized").exists():
        write_params(base)
        run(base, "quantize")
    write_params(base, **speed.train_params(*speed.SIDES["ours-packed"]))
    code = (
        "import runpy, sys; sys.argv = ['train']; import stages.shared.device as device\n"
        "if {off}: device._be_deterministic = lambda: None\n"
        "runpy.run_module('stages.train', run_name='__main__', alter_sys=True)"
    )
    rates, sums = {"on": [], "off": []}, []
    for _ in range(PAIRS_7B + 1):
        for side in rates:
            subprocess.run(
                [sys.executable, "-c", code.format(off=side == "off")],
                cwd=base,
                env=os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"},
                check=True,
            )
            cost = json.loads((base / "metrics/train_cost.json").read_text(encoding="utf-8"))
            rates[side].append(cost["steady_tokens_per_second"])
            if side == "on":
                sums.append(outcome(base, TRAINED))
            print(side, cost["steady_tokens_per_second"], flush=True)
    kept = {side: values[1:] for side, values in rates.items()}
    each = [100 * (1 - on / off) for on, off in zip(kept["on"], kept["off"], strict=True)]
    return {
        "7b": [
            {
                "what": f"{len(sums)} runs of Mistral-7B's shape, packed, r = {speed.RANK}",
                "equal": all(entry == sums[0] for entry in sums),
            }
        ],
        "cost_percent": statistics.median(each),
        "cost_percent_of_pairs": each,
        "steady_tokens_per_second": kept,
    }


def perplexity(work: Path) -> dict:
    """The spread of a perplexity over batch sizes, and over the order of the rows."""
    from stages.shared.device import pick_device
    from stages.shared.model import load_base
    from stages.shared.rows import read_rows
    from stages.shared.scoring import score

    base = work / "7b"
    model = load_base(base / "models/quantized", pick_device())
    rows = read_rows(base / "data/prepared/train.arrow")[:100]
    found = {str(size): score(model, rows, size).perplexity for size in BATCH_TOKENS}
    found["4096, other order"] = score(model, rows[::-1], 4096).perplexity
    values = list(found.values())
    spread = 100 * (max(values) - min(values)) / min(values)
    return {"perplexity": found, "perplexity_spread_percent": spread}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--work", type=Path)
    wanted.add_argument("--beside", type=Path, metavar="OTHER.json")
    parser.add_argument("parts", nargs="*", default=PARTS, metavar="|".join(PARTS))
    arguments = parser.parse_args()
    if arguments.beside:
        result, other = (json.loads(p.read_text("utf-8")) for p in (RESULTS, arguments.beside))
        result["two_gpus"] = two_gpus(result, other)
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(result["two_gpus"], indent=1))
        return
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    functions = {"small": small, "pipeline": pipeline, "7b": seven_b, "perplexity": perplexity}
    result = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for part in arguments.parts:
        result |= functions[part](work)
        result |= totals(result)
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def two_gpus(result: dict, other: dict) -> dict:
    """Whether `pipeline` gave the same bytes on two GPUs of one model.

    Raises ValueError when they are one GPU, two models, or ran with other library versions.
    """
    if result["device_uuid"] == other["device_uuid"]:
        raise ValueError(f"both ran on GPU {other['device_uuid']}")
    for key in ("device", "versions"):
        if result[key] != other[key]:
            raise ValueError(f"{key}: {result[key]} and {other[key]}")
    pairs = [
        (a["what"].removeprefix("two runs: "), a["digest"] == b["digest"])
        for a, b in zip(result["pipeline"], other["pipeline"], strict=True)
        if "digest" in a
    ]
    return {
        "device_uuids": [result["device_uuid"], other["device_uuid"]],
        "outputs": [name for name, _ in pairs],
        "equal": [name for name, same in pairs if same],
    }


def totals(result: dict) -> dict:
    """The summary over all parts that have run, with versions and date."""
    import torch

    pairs = [pair for part in PARTS for pair in result.get(part, []) if isinstance(pair, dict)]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(),
        "device_uuid": str(torch.cuda.get_device_properties(0).uuid),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "pairs": [{k: pair[k] for k in ("what", "equal", "digest") if k in pair} for pair in pairs],
        "kills": sum(pair.get("kills", 0) for pair in pairs),
        "kills_equal": sum(pair["kills"] for pair in pairs if pair.get("kills_equal")),
    }


if __name__ == "__main__":
    main()
