"""Several GPUs against one with the same params: rate, loss, bytes, memory, and a kill.

    python -m benchmarks.scale --work DIR                      # every part, on 2 or more GPUs
    python -m benchmarks.scale --work DIR 7b kill              # some of them
    python -m benchmarks.scale --work DIR --shape tiny --rows 200 7b kill score   # on a CPU
    python -m benchmarks.scale --work DIR --shape llama-3.2-1b score   # shorter
    python -m benchmarks.scale --work DIR --shape llama-2-70b-8-layers --rows 300 one copies

    7b      Mistral-7B's shape, packed, r = 64, batch_size 8 x gradient_accumulation 2: an epoch of
            1,000 rows on one GPU, and two on all: rates, both loss curves, adapters' bytes
    70b     Llama-2-70B's shape on all GPUs held to --cap-gb each, one row of 4,096 tokens a GPU
    kill    7b's run, rank 1 killed in the middle, and in a second run stopped: seconds until all
            has ended, the line, and the bytes after it went on
    score   evaluate and verify on one GPU and on all: figures and rates
    one     7b's run on one GPU with random NF4 weights, in the stage's own process (also what a
            launcher with WORLD_SIZE=1 gets) and as a rank in a world of one: rates and bytes
    copies  two processes on one GPU that stream from one host copy of a random NF4 model: host
            memory and logits

Weights and rows are random. `one` and `copies` need 1 GPU. The other parts run on 1 and on --gpus
of them, by default all that are visible. Writes benchmarks/results/scale.json after every part.
"""

import argparse
import csv
import importlib.metadata
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import speed

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/scale.json"
PARTS = ("7b", "70b", "kill", "score", "one", "copies")
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "liger-kernel")
TRAINED = ("models/adapter/adapter_model.safetensors", "metrics/train.json", "metrics/curve.csv")
LORA = {"r": 64, "alpha": 16, "dropout": 0.0, "target_modules": "all-linear"}
TRAIN = {
    "epochs": 1.0,
    "batch_size": 8,
    "gradient_accumulation": 2,
    "learning_rate": 2e-4,
    "batching": "packing",
    "gradient_checkpointing": "auto",
    "optimizer": "adamw_torch_fused",
}
SCORED_ROWS = 200
HANG_SECONDS = 20
# The stage trains one device itself; here a rank does, as one of several would.
AS_A_RANK = """
from stages.shared.process import begin
begin("train")
from stages import train

def in_a_rank(devices, params, folder):
    store = train.host()
    train.put(store, "task", {"key": folder.name})
    return train.run_ranks("train", train.work, devices[:1], store, size=1, stoppable=True)

train.train_on = in_a_rank
train.main()
"""
# How `one` trains: the interpreter's arguments.
WAYS = {"process": ["-m", "stages.train"], "rank": ["-c", AS_A_RANK]}
REPEATS = 2
LONG_ROWS, LONG_TOKENS, SHARD_BYTES = 16, 4096, 4e9


def gpus(count: int) -> dict[str, str]:
    """The environment in which `count` devices are visible; on a CPU, as many ranks."""
    import torch

    if not torch.cuda.device_count():
        return {"CPU_RANKS": str(count), "OMP_NUM_THREADS": "1"}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else map(str, range(torch.cuda.device_count()))
    return {"CUDA_VISIBLE_DEVICES": ",".join(list(names)[:count])}


def stage(work: Path, name: str, count: int, **env: str) -> tuple[str, float]:
    """Run a stage of `work` on `count` devices; returns its output and wall seconds."""
    return python(work, name, ["-m", f"stages.{name}"], count, **env)


def python(work: Path, name: str, arguments: list, count: int, **env: str) -> tuple[str, float]:
    """Run Python in `work`, as `stage` does."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=work,
        env=os.environ | gpus(count) | env,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{work}: {name} failed:\n{done.stdout}\n{done.stderr}")
    print(f"{done.stdout}{name}: {time.monotonic() - started:.0f} s in all", flush=True)
    return done.stdout, time.monotonic() - started


def make(work: Path, shape: str, rows: int) -> None:
    """The workspace of a 16-bit shape of random_models.SHAPES, quantized."""
    from benchmarks.random_models import SHAPES, write_base
    from stages.shared.device import pick_device

    if (work / "models/quantized").exists():
        return
    speed.SHAPE["vocab_size"] = SHAPES[shape].vocabulary
    if shape.startswith("tiny"):
        # A rehearsal, in minutes.
        speed.MAX_LENGTH = 64
    speed.make_tokenizer(work / "models/base", SHAPES[shape].vocabulary)
    write_base(shape, work / "models/base", pick_device())
    speed.make_workspace(work, rows)
    write_params(work)
    stage(work, "quantize", 1)


def write_params(work: Path, **sections: dict) -> None:
    import yaml

    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for section, values in ({"lora": LORA, "train": TRAIN} | sections).items():
        params[section] |= values
    params["retention"] = None
    (work / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")


def digests(work: Path) -> dict[str, str]:
    from stages.shared.process import sha256

    return {name: sha256(work / name) for name in TRAINED}


def cost(work: Path, name: str = "train") -> dict:
    return json.loads((work / f"metrics/{name}_cost.json").read_text(encoding="utf-8"))


def rates(work: Path) -> dict:
    found = cost(work)
    keys = ("ranks", "tokens_per_second", "steady_tokens_per_second", "train_seconds")
    return {key: found[key] for key in keys} | {k: v for k, v in found.items() if "peak" in k}


def curve(work: Path) -> list[tuple[int, float]]:
    with (work / "metrics/curve.csv").open(encoding="utf-8") as file:
        return [(int(line["step"]), float(line["loss"])) for line in csv.DictReader(file)]


def seven_b(work: Path, options) -> dict:
    base = work / "7b"
    make(base, options.shape, options.rows)
    write_params(base)
    # Kernels compile in the first run, so only its bytes count.
    stage(base, "train", options.gpus)
    runs, sums = {}, [digests(base)]
    for count in (1, options.gpus):
        _, seconds = stage(base, "train", count)
        runs[f"{count} GPUs"] = rates(base) | {"wall_seconds": seconds, "curve": curve(base)}
        sums += [digests(base)] if count > 1 else []
    one, many = runs["1 GPUs"], runs[f"{options.gpus} GPUs"]
    losses = [abs(a[1] - b[1]) for a, b in zip(one["curve"], many["curve"], strict=True)]
    return {
        "7b": runs,
        "7b_steady_ratio": many["steady_tokens_per_second"] / one["steady_tokens_per_second"],
        "7b_epoch_ratio": many["tokens_per_second"] / one["tokens_per_second"],
        "7b_largest_difference_of_losses": max(losses),
        "7b_two_runs_equal": sums[0] == sums[1],
        "shape": options.shape,
        "rows": options.rows,
    }


def seventy_b(work: Path, options) -> dict:
    """Every rank is limited as plan.vram_limit_gb would limit it."""
    base = work / "70b"
    shape = large_shape(options)
    if not (base / "models/quantized").exists():
        make_quantized(base, shape)
    runs = {}
    for count in (1, options.gpus):
        train = TRAIN | {"batch_size": 1, "gradient_accumulation": options.gpus}
        train |= {"batching": "shuffle"}
        write_params(base, lora=LORA | {"r": 16}, train=train)
        (base / "metrics").mkdir(exist_ok=True)
        before = shared_memory()
        peak = Watched(base)
        limit = {"vram_limit_gb": options.cap_gb}
        (base / "metrics/plan.json").write_text(json.dumps(limit), encoding="utf-8")
        stage(base, "train", count)
        runs[f"{count} GPUs"] = rates(base) | {"host_gb": peak.stop() - before}
    one, many = runs["1 GPUs"], runs[f"{options.gpus} GPUs"]
    ratio = many["steady_tokens_per_second"] / one["steady_tokens_per_second"]
    return {
        "70b": runs,
        "70b_steady_ratio": ratio,
        "70b_shape": shape,
        "70b_cap_gb": options.cap_gb,
    }


def large_shape(options) -> str:
    return "llama-2-70b" if options.shape == "mistral-7b" else options.shape


def make_quantized(work: Path, shape: str, rows: int | None = None) -> None:
    """Random NF4 weights, layer by layer, since a 70B in 16 bit would not fit in memory.

    rows  to pack; None: a few long ones
    """
    import torch
    from safetensors.torch import save_file

    from benchmarks.random_models import SHAPES, SPREAD, _on_meta, config_of, random_nf4
    from stages.quantize import name_shards, quantization_config
    from stages.shared.device import pick_device
    from stages.shared.outputs import write_json, write_sums

    speed.SHAPE["vocab_size"] = SHAPES[shape].vocabulary
    speed.make_tokenizer(work / "models/base", SHAPES[shape].vocabulary)
    speed.make_workspace(work, rows or LONG_ROWS)
    if rows is None:
        long_rows(work, SHAPES[shape].vocabulary)
    out, device = work / "models/quantized", pick_device()
    out.mkdir(parents=True)
    config = config_of(shape)
    model = _on_meta(config)
    head, linear = model.get_output_embeddings(), torch.nn.Linear
    shards: list[dict[str, int]] = []
    pending: dict[str, torch.Tensor] = {}

    def flush() -> None:
        save_file(pending, out / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append({name: tensor.nbytes for name, tensor in pending.items()})
        pending.clear()

    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{key}"
            if type(module) is linear and module is not head:
                weight = random_nf4(module.out_features, module.in_features, True, device)
                state = weight.quant_state.as_dict(packed=True)
                made = {name: weight.data} | {f"{name}.{k}": v for k, v in state.items()}
            else:
                value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
                value = value.fill_(1) if parameter.ndim == 1 else value.normal_(0, SPREAD)
                made = {name: value}
            pending |= {name: tensor.to("cpu", copy=True) for name, tensor in made.items()}
            if sum(tensor.nbytes for tensor in pending.values()) > SHARD_BYTES:
                flush()
    if pending:
        flush()
    name_shards(out, shards)
    config.architectures, config.dtype = [type(model).__name__], "bfloat16"
    content = config.to_dict() | {"quantization_config": quantization_config(True).to_dict()}
    write_json(out / "config.json", content, sort_keys=True)
    source = {"source": "local", "id": shape, "revision": None, "commit": None, "files": {}}
    write_json(out / "source.json", source)
    write_sums(out)


def long_rows(work: Path, vocabulary: int) -> None:
    """Replace the rows by ones of LONG_TOKENS each."""
    draw = random.Random(speed.SEED)
    rows = [draw.choices(range(3, vocabulary), k=LONG_TOKENS) for _ in range(LONG_ROWS)]
    (work / "data/prepared/prepared.json").write_text(json.dumps({"max_length": LONG_TOKENS}))
    for name, part in (("train", rows), ("eval", rows[:2])):
        write_rows(
            work,
            name,
            [
                {"row": str(i), "input_ids": ids, "labels": ids, "prompt_tokens": 1}
                | {"scored_bytes": len(ids)}
                for i, ids in enumerate(part)
            ],
        )


def write_rows(work: Path, name: str, rows: list[dict]) -> None:
    import pyarrow as pa

    from stages.shared.outputs import write_sums
    from stages.shared.rows import SCHEMA

    with pa.OSFile(str(work / f"data/prepared/{name}.arrow"), "wb") as file:
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        with pa.ipc.new_stream(file, SCHEMA) as writer:
            writer.write_table(table)
    write_sums(work / "data/prepared")


def shared_memory() -> float:
    """GB of host memory in use, by /proc/meminfo."""
    found = meminfo()
    return found["MemTotal"] - found["MemAvailable"]


def meminfo() -> dict[str, float]:
    """/proc/meminfo, in GB."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 / 1e9 for line in lines}


class Watched:
    """The maximum of `shared_memory` from now on."""

    def __init__(self, work: Path):
        code = (
            "import sys, time\nfrom benchmarks.scale import shared_memory\nmost = 0.0\n"
            "while True:\n    most = max(most, shared_memory())\n"
            "    open(sys.argv[1], 'w').write(str(most))\n    time.sleep(0.2)"
        )
        self.file = work / "host_gb"
        command = [sys.executable, "-c", code, str(self.file)]
        self.process = subprocess.Popen(command, cwd=ROOT)

    def stop(self) -> float:
        self.process.kill()
        self.process.wait()
        return float(self.file.read_text())


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ended(base: Path, options, what: signal.Signals, seconds: float, **env: str) -> dict:
    """Train, send rank 1 the signal in the middle; when all have ended, and what is said.

    seconds  of the whole training, undisturbed
    """

    def checkpoints() -> set[Path]:
        return set(base.glob("checkpoints/*/checkpoint-*/SHA256SUMS"))

    before = checkpoints()
    process = subprocess.Popen(
        [sys.executable, "-m", "stages.train"],
        cwd=base,
        env=os.environ | gpus(options.gpus) | {"CHECKPOINT_SECONDS": str(seconds / 20)} | env,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not checkpoints() - before:
        time.sleep(0.05)
    time.sleep(random.Random(0).uniform(0.1, 0.2) * seconds)
    ranks = children(process.pid)
    since = time.monotonic()
    os.kill(ranks[1], what)
    process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        time.sleep(0.01)
    waited = time.monotonic() - since
    lines = process.stderr.read().splitlines()
    return {
        "seconds_until_all_ended": waited,
        "line": [text for text in lines if text.startswith("train: ")][-1],
    }


def kill(work: Path, options) -> dict:
    base = work / "7b"
    make(base, options.shape, options.rows)
    write_params(base)
    stage(base, "train", options.gpus)
    expected, whole = digests(base), cost(base)["train_seconds"]
    shutil.rmtree(base / "models/adapter")
    killed = ended(base, options, signal.SIGKILL, whole)
    hung = ended(base, options, signal.SIGSTOP, whole, RANKS_TIMEOUT=str(HANG_SECONDS))
    said, _ = stage(base, "train", options.gpus)
    return {
        "kill": killed,
        "hang": hung | {"timeout_seconds": HANG_SECONDS},
        "kill_shape": options.shape,
        "kill_went_on": "resuming from" in said,
        "kill_same_bytes": digests(base) == expected,
    }


def score(work: Path, options) -> dict:
    base = work / "7b"
    make(base, options.shape, options.rows)
    write_params(base, evaluate={"samples": 0})
    held_out(base, min(SCORED_ROWS, options.rows))
    no_retention(base)
    if not (base / "models/adapter").exists():
        stage(base, "train", options.gpus)
    stage(base, "merge", 1)
    found, runs = [], {}
    for count in (1, options.gpus):
        seconds = {name: stage(base, name, count)[1] for name in ("evaluate", "verify")}
        names = ("metrics/eval.json", "metrics/verify.json")
        found.append([(base / name).read_text(encoding="utf-8") for name in names])
        runs[f"{count} GPUs"] = {
            "evaluate_tokens_per_second": cost(base, "eval")["tokens_per_second"],
            "evaluate_wall_seconds": seconds["evaluate"],
            "verify_wall_seconds": seconds["verify"],
        }
    equal = found[0] == found[1]
    return {"score": runs, "score_shape": options.shape, "score_figures_equal": equal}


def one(work: Path, options) -> dict:
    base = work / "one"
    if not (base / "models/quantized").exists():
        make_quantized(base, options.shape, options.rows)
    write_params(base)
    # Kernels compile in the first run.
    stage(base, "train", 1)
    runs: list[dict] = []
    for way in [*WAYS] * REPEATS:
        _, seconds = python(base, way, WAYS[way], 1)
        found = rates(base) | {"wall_seconds": seconds}
        runs.append({"way": way} | found | {"adapter_sha256": digests(base)[TRAINED[0]]})
    return {"one": runs, "one_shape": options.shape} | of_one(runs)


def of_one(runs: list[dict]) -> dict:
    """The rank's rate as a share of the process's, by medians, and whether all adapters agree."""
    steady, epoch = (
        [statistics.median(run[key] for run in runs if run["way"] == way) for way in WAYS]
        for key in ("steady_tokens_per_second", "tokens_per_second")
    )
    sums = {run["adapter_sha256"] for run in runs}
    return {
        "one_steady_ratio": steady[1] / steady[0],
        "one_epoch_ratio": epoch[1] / epoch[0],
        "one_same_bytes": len(sums) == 1,
    }


def copies(work: Path, options) -> dict:
    """The second process's own streamed weights are zeros, so equal logits are from the copy."""
    shape, before = large_shape(options), meminfo()
    spawn = multiprocessing.get_context("spawn")
    told, pipes, processes, memory = [], [], [], []
    try:
        for _ in range(2):
            here, there = spawn.Pipe()
            path = told[0]["path"] if told else None
            processes.append(spawn.Process(target=use_copy, args=(shape, path, there)))
            processes[-1].start()
            there.close()
            pipes.append(here)
            told.append(here.recv())
            now = meminfo()
            memory.append(
                {
                    "host_gb": now["MemTotal"] - now["MemAvailable"],
                    "shared_gb": now["Shmem"],
                }
            )
            print(f"copies: {told[-1]}, {memory[-1]}", flush=True)
        for pipe in pipes:
            pipe.send("end")
    finally:
        for process in processes:
            process.join(60)
            process.kill()
    start = {"host_gb": before["MemTotal"] - before["MemAvailable"], "shared_gb": before["Shmem"]}
    return {
        "copies": [
            {key: found[key] - start[key] for key in found} | {"own_gb": one["own_gb"]}
            for found, one in zip(memory, told, strict=True)
        ],
        "copies_shape": shape,
        "copies_bytes_gb": told[0]["copy_gb"],
        "copies_same_logits": told[0]["logits"] == told[1]["logits"],
    }


def use_copy(shape: str, path: str | None, pipe) -> None:
    """Compute logits with all layers streamed from a new host copy, or from the one at `path`.

    Sends what it found, and ends when it is told to.
    """
    import hashlib

    import torch

    from benchmarks.cards import status
    from benchmarks.random_models import build
    from stages.shared import layer_sources
    from stages.shared.device import pick_device
    from stages.shared.streaming import decoder_layers, stream_layers, streamed_weights

    device = pick_device()
    if device.type == "cpu":
        # A rehearsal: there is no driver to lock memory.
        layer_sources.lock = lambda buffer: None
    torch.manual_seed(speed.SEED)
    model = build(shape, True, torch.device("cpu"))
    layers = decoder_layers(model)
    if path:
        for layer in layers:
            for weight in streamed_weights(layer):
                weight.data.zero_()
    streamer = stream_layers(model, device, len(layers), path=path)
    source = streamer.source
    assert isinstance(source, layer_sources.HostCopy), "the host copy cannot be locked"
    ids = torch.arange(3, 3 + 64, device=device)[None]
    with torch.no_grad():
        logits = model(ids).logits.float().cpu()
    assert logits.isfinite().all()
    assert logits.std() > 0
    pipe.send(
        {
            "path": source.path,
            "copy_gb": source.host_bytes / 1e9,
            "own_gb": status("RssAnon") / 1e9,
            "logits": hashlib.sha256(logits.numpy().tobytes()).hexdigest(),
        }
    )
    pipe.recv()


def no_retention(work: Path) -> None:
    """Write what fetch_retention does for `retention: null`."""
    from stages.shared.outputs import write_sums

    folder = work / "data/retention"
    folder.mkdir(exist_ok=True)
    (folder / "texts.jsonl").touch()
    write_sums(folder)


def held_out(work: Path, count: int) -> None:
    """Make the held-out set `count` rows of the training set."""
    from stages.shared.rows import read_rows

    write_rows(work, "eval", read_rows(work / "data/prepared/train.arrow")[:count])


def machine(options) -> dict:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.device_count() else "CPU"
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    date = datetime.now(UTC).date().isoformat()
    return {"date": date, "device": device, "versions": versions, "gpus": options.gpus}


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shape", default="mistral-7b", help="of all parts but 70b")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--cap-gb", type=float, default=24)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("parts", nargs="*", default=PARTS, metavar="|".join(PARTS))
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    functions = {"7b": seven_b, "70b": seventy_b, "kill": kill, "score": score}
    functions |= {"one": one, "copies": copies}
    result = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    for part in options.parts:
        result |= functions[part](work, options) | {f"{part}_run": machine(options)}
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
