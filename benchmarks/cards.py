"""The recipes limited to cards of 24, 16 and 12 GB, and a 70B shape to 48 GB, on a larger GPU.

    python -m benchmarks.cards --work DIR               # every part, on one NVIDIA GPU of 140 GB
    python -m benchmarks.cards --work DIR 70b oom       # some of them

Each process is limited to a card's size: torch.cuda.set_per_process_memory_fraction limits its
allocator to the card's memory (24e9 bytes for 24 GB) minus the CUDA context (as measured for
placement.py, with offloading) and minus a paged optimizer's managed memory, which the allocator
does not count.

    mistral-7b-guanaco, mistral-7b-fast, llama-2-7b
            the recipe's own parameters and real stages at its 7B shape: random 16-bit weights and
            rows, 20 steps, 16 held-out rows. The chains run in parallel, so their times are not
            meaningful. mistral-7b-guanaco also at 16 and 12 GB, if plan permits it.
    llama-3-70b-24gb
            the same at 70B's width and 8 layers, limited to 6 GB, where evaluate and verify stream
            layers, then to 80 GB, where they do not: 100 held-out rows of 2,048 tokens, 8 prompts
            of 1,920 tokens answered. If it is the only part, nothing runs in parallel.
    70b     a Llama of 80 layers, built as NF4, 5 steps of 2,048 tokens at 48 GB
    load    seconds and host memory: from models/quantized, and quantizing while loading
    oom     training with too little memory: its message, exit status and outputs

`load` and `oom` use what the recipe parts left behind. --weights, by default DIR too, needs 28 GB
in 16 bit and 8 GB in NF4, DIR 15 GB for each merge; the number of concurrent merges is limited by
the disk. Writes benchmarks/results/cards.json after every stage.
"""

import argparse
import json
import math
import os
import random
import runpy
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stages.shared.outputs import GB

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/cards.json"
# Of 70B's width: evaluate and verify streamed and resident, on so many rows of 2,048 tokens.
WIDE, WIDE_ROWS = "llama-3-70b-24gb", 100
# Recipe: its shape, and the cards that it is tried on.
RECIPES = {
    "mistral-7b-guanaco": ("mistral-7b", (24, 16, 12)),
    "mistral-7b-fast": ("mistral-7b", (24,)),
    "llama-2-7b": ("llama-2-7b", (24,)),
    WIDE: ("llama-2-70b-8-layers", (6, 80)),
}
PARTS = [*RECIPES, "70b", "load", "oom"]
STAGES = ("plan", "train", "evaluate", "merge", "verify")
# 20 steps of 4 rows, or of 2 packs of 2,048 tokens; so many long rows that a step has only those.
ROWS, LONG_ROWS, HELD_OUT_ROWS, SEED = 80, 24, 16, 7
STEPS_70B = 5
# Tokens of a row that are no prompt, and the longest answer.
ANSWER, LONGEST_ANSWER = 128, 32
# The recipe of `load` and `oom`, and a card that holds its weights and not its first step.
SEED_RECIPE = "mistral-7b-guanaco"
OOM_GB = 8
MERGED_BYTES = 15e9
_saving = threading.Lock()


def random_rows(
    vocabulary: int, max_length: int, wide: bool = False
) -> tuple[list[list[int]], list[list[int]]]:
    """(training, held-out) rows of token ids, log-normal in length (benchmarks/speed.py).

    wide  as for WIDE: all held-out rows have the maximum length
    """
    draw = random.Random(SEED)

    def row(long: bool) -> list[int]:
        length = max_length if long else int(draw.lognormvariate(math.log(380), 0.75))
        inner = max(16, min(max_length, length)) - 2
        return [1, *draw.choices(range(3, vocabulary), k=inner), 2]

    train = [row(i < LONG_ROWS) for i in range(ROWS)]
    draw.shuffle(train)
    if wide:
        return train, [row(True) for _ in range(WIDE_ROWS)]
    return train, [row(i < 2) for i in range(HELD_OUT_ROWS)]


def make_base(shape: str) -> None:
    """Write the shape's 16-bit weights into models/base, as fetch_model does."""
    from benchmarks.random_models import SHAPES, write_base
    from benchmarks.speed import make_tokenizer
    from stages.shared.device import pick_device

    started, base = time.monotonic(), Path("models/base")
    make_tokenizer(base, SHAPES[shape].vocabulary)
    parameters = write_base(shape, base, pick_device())
    seconds = time.monotonic() - started
    print(f"cards: {shape}: {parameters} parameters written in {seconds:.0f} s", flush=True)


def copy_project(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "stages", folder / "stages", dirs_exist_ok=True)
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, folder / name)


def make_workspace(recipe: str, source: Path, folder: Path, card: float) -> None:
    """A workspace of `recipe` in which plan can start, on the base and NF4 of workspace `source`.

    plan's limit is the card's size, so plan decides whether training starts.
    """
    import pyarrow as pa
    import yaml

    from stages.shared.outputs import write_sums
    from stages.shared.rows import SCHEMA

    shutil.rmtree(folder, ignore_errors=True)
    copy_project(folder)
    params = yaml.safe_load((ROOT / f"recipes/{recipe}.yaml").read_text(encoding="utf-8"))
    params["plan"]["vram_limit_gb"] = card
    params["tracking"]["report_to"] = "none"
    params["retention"] = None
    params["evaluate"]["max_answer_tokens"] = LONGEST_ANSWER
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    models, prepared = folder / "models", folder / "data/prepared"
    (models / "tokenizer").mkdir(parents=True)
    (prepared / "tokenizer").mkdir(parents=True)
    for name in ("base", "quantized"):
        (models / name).symlink_to((source / "models" / name).resolve())
    names = ("tokenizer.json", "tokenizer_config.json", "config.json")
    for name in names:
        shutil.copy(source / "models/base" / name, models / "tokenizer" / name)
    for name in names[:2]:
        shutil.copy(source / "models/base" / name, prepared / "tokenizer" / name)
    longest = params["prepare"]["max_length"]
    config = json.loads((models / "tokenizer/config.json").read_text(encoding="utf-8"))
    parts = random_rows(config["vocab_size"], longest, recipe == WIDE)
    for name, rows in zip(("train", "eval"), parts, strict=True):
        table = pa.Table.from_pylist(
            [
                {
                    "row": str(i),
                    "input_ids": ids,
                    "labels": ids,
                    "prompt_tokens": max(1, len(ids) - ANSWER),
                    "scored_bytes": 1,
                }
                for i, ids in enumerate(rows)
            ],
            schema=SCHEMA,
        )
        with (
            pa.OSFile(str(prepared / f"{name}.arrow"), "wb") as file,
            pa.ipc.new_stream(file, SCHEMA) as writer,
        ):
            writer.write_table(table)
    (prepared / "prepared.json").write_text(json.dumps({"max_length": longest}))
    (folder / "data/retention").mkdir()
    (folder / "data/retention/texts.jsonl").touch()
    for made in (models / "tokenizer", prepared, folder / "data/retention"):
        write_sums(made)


class Watch:
    """Peaks of this process's GPU allocator and host memory until `report`.

    Host memory twice: including and excluding mapped files.
    """

    def __init__(self):
        self.anonymous, self.done = 0, threading.Event()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while not self.done.wait(0.02):
            self.anonymous = max(self.anonymous, status("RssAnon"))

    def report(self) -> dict[str, float]:
        self.done.set()
        return {
            "peak_ram_gb": status("VmHWM") / GB,
            "peak_anonymous_ram_gb": max(self.anonymous, status("RssAnon")) / GB,
        }


def status(key: str) -> int:
    """Bytes of one field of /proc/self/status (proc(5))."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{key}:")[2].split()[0]) * 1024


class Peaks:
    """The GPU allocator's peaks over the whole process, even if a stage resets them."""

    def __init__(self, limit: float | None):
        import torch

        self.torch, self.allocated, self.reserved = torch, 0, 0
        if not torch.cuda.is_available():
            return
        if limit:
            total = torch.cuda.mem_get_info()[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
        reset = torch.cuda.reset_peak_memory_stats

        def note_and_reset(*args):
            self.note()
            reset(*args)

        torch.cuda.reset_peak_memory_stats = note_and_reset

    def note(self) -> None:
        cuda = self.torch.cuda
        self.allocated = max(self.allocated, cuda.max_memory_allocated())
        self.reserved = max(self.reserved, cuda.max_memory_reserved())

    def report(self) -> dict[str, float]:
        cuda = self.torch.cuda
        if not cuda.is_initialized():
            return {}
        self.note()
        free, total = cuda.mem_get_info()
        return {
            "allocated_gb": self.allocated / GB,
            "reserved_gb": self.reserved / GB,
            # Everything on the device beside this allocator: this process's context and, if
            # others run in parallel, all of theirs.
            "besides_gb": (total - free - cuda.memory_reserved()) / GB,
        }


def capped(stage: str, limit: float | None, report: str) -> None:
    """Run a stage as `python -m` does, in the working directory, limited to `limit` bytes."""
    watch, peaks = Watch(), Peaks(limit)
    try:
        runpy.run_module(f"stages.{stage}", run_name="__main__", alter_sys=True)
    finally:
        Path(report).write_text(json.dumps(peaks.report() | watch.report()))


def in_process(call: str, folder: Path, log: Path) -> int:
    """Run a function of this file in its own process, in `folder`; returns the exit status."""
    known = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, known))}
    # train's second attempt would be a process without the limit.
    environment["TRAIN_TIGHTER"] = "0"
    command = [sys.executable, "-c", f"from benchmarks import cards; cards.{call}"]
    with log.open("w") as out:
        return subprocess.run(
            command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT
        ).returncode


def run_stage(folder: Path, stage: str, limit: float | None) -> dict:
    """One stage, limited to `limit` bytes: exit status, peaks and, if it failed, its message."""
    started = time.monotonic()
    report, log = folder / f"{stage}.json", folder / f"{stage}.log"
    report.unlink(missing_ok=True)
    code = in_process(f"capped({stage!r}, {limit!r}, {report.name!r})", folder, log)
    found = {"stage": stage, "exit": code, "seconds": round(time.monotonic() - started, 1)}
    if report.exists():
        found |= json.loads(report.read_text())
    if code:
        lines = log.read_text(encoding="utf-8").strip().splitlines()
        # Libraries may print warnings at the end of a process.
        found["said"] = [line for line in lines if line.startswith(f"{stage}:")] or lines[-3:]
    return found


def allocator_bytes(card: float, managed: float = 0.0) -> float:
    """Bytes that a process's allocator may reserve on a card of `card` GB."""
    from stages.shared import placement

    return card * GB - placement.CONTEXT - placement.OFFLOADING_CONTEXT - managed


def chain(recipe: str, shape: str, source: Path, work: Path, card: int, merging) -> None:
    """The stages from plan to verify on a card of `card` GB, up to the first that fails."""
    folder = work / f"{recipe}-{card}"
    make_workspace(recipe, source, folder, card)
    part: dict[str, Any] = {"part": recipe, "card_gb": card, "shape": shape, "stages": []}

    def run(stage: str) -> bool:
        # plan uses no GPU, and only training has an optimizer.
        managed = part["managed_gb"] * GB if stage == "train" else 0.0
        limit = None if stage == "plan" else allocator_bytes(card, managed)
        found = run_stage(folder, stage, limit)
        if "reserved_gb" in found:
            found["device_gb"] = found["reserved_gb"] + card - allocator_bytes(card, managed) / GB
        part["stages"].append(found)
        save(part)
        print(f"cards: {recipe} {card} GB: {found}", flush=True)
        return found["exit"] == 0

    if not run("plan"):
        return
    part |= planned(folder)
    plan = json.loads((folder / "metrics/plan.json").read_text(encoding="utf-8"))
    part |= {"plan": next(entry for entry in plan["cards"] if entry["card_gb"] == card)}
    if run("train"):
        part |= json.loads((folder / "metrics/train.json").read_text())
        part |= placed(folder)
        part["tokens_per_step"] = part["tokens"] / part["steps"]
        if run("evaluate"):
            # Without its answers; for verify the stage's time is enough.
            cost = json.loads((folder / "metrics/eval_cost.json").read_text())
            part["eval_seconds"] = cost["eval_seconds"]
            with merging:
                _ = run("merge") and run("verify")
                shutil.rmtree(folder / "models/merged", ignore_errors=True)


def planned(folder: Path) -> dict:
    """plan's figures, with the managed bytes of a paged optimizer."""
    import yaml

    plan = json.loads((folder / "metrics/plan.json").read_text(encoding="utf-8"))
    train = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))["train"]
    paged = train["optimizer"].startswith("paged")
    return {
        "predicted_gb": plan["predicted_peak_vram_gb"],
        "predicted_device_gb": plan["predicted_device_gb"],
        "managed_gb": plan["optimizer_gb"] if paged else 0.0,
    }


def placed(folder: Path) -> dict:
    """train's prediction for its placement, in place of plan's figures."""
    cost = json.loads((folder / "metrics/train_cost.json").read_text(encoding="utf-8"))
    names = {
        "predicted_gb": "predicted_peak_vram_gb",
        "predicted_device_gb": "predicted_device_gb",
        "streamed_layers": "streamed_layers",
        "dense_layers": "dense_layers",
        "kept_mlp_layers": "kept_mlp_layers",
        "kept_attention_layers": "kept_attention_layers",
    }
    return {name: cost[key] for name, key in names.items() if key in cost}


def recipes(work: Path, weights: Path, names: list[str]) -> None:
    """Every chain of the named recipes, side by side, as soon as its base is quantized."""
    shapes = sorted({RECIPES[name][0] for name in names})
    room = shutil.disk_usage(work).free
    if weights == work:
        room -= len(shapes) * (MERGED_BYTES + 5e9)
    merging = threading.Semaphore(max(1, int(room / MERGED_BYTES)))

    def of_shape(shape: str) -> None:
        source = weights / shape
        if not (source / "models/base/SHA256SUMS").exists():
            copy_project(source)
            code = in_process(f"make_base({shape!r})", source, source / "base.log")
            print((source / "base.log").read_text(encoding="utf-8"), flush=True)
            if code:
                return
        if not (source / "models/quantized").exists():
            card = min(min(RECIPES[name][1]) for name in names if RECIPES[name][0] == shape)
            found = run_stage(source, "quantize", allocator_bytes(card))
            save({"part": "quantize", "card_gb": card, "shape": shape, "stages": [found]})
            print(f"cards: {shape}: {found}", flush=True)
        cards = [(name, c) for name in names if RECIPES[name][0] == shape for c in RECIPES[name][1]]
        # Where seconds count, one after the other.
        with ThreadPoolExecutor(1 if WIDE in names else len(cards)) as pool:
            jobs = [
                pool.submit(chain, name, shape, source, work, card, merging) for name, card in cards
            ]
        for job in jobs:
            job.result()

    with ThreadPoolExecutor(len(shapes)) as pool:
        list(pool.map(of_shape, shapes))


def seventy() -> None:
    """Train the 70B shape with the memory of a 48 GB card, and print the part."""
    import torch
    from datasets import disable_caching

    from benchmarks.vram import Point, peaks, predicted, prepare, random_rows

    disable_caching()
    started = time.monotonic()
    limit = allocator_bytes(48)
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    point = Point("llama-2-70b", "qlora", 16, 2048)
    trainer, fast, placed = prepare(point, torch.device("cuda", 0), random_rows(point, STEPS_70B))
    print(json.dumps(facts_of(trainer)), flush=True)
    trainer.train()
    used = vars(fast) | {"offload": placed.offload}
    found = vars(point) | {"fast": used} | peaks(trainer)
    guess = predicted(found)
    seconds = time.monotonic() - started
    part = {"part": "70b", "card_gb": 48, "seconds": round(seconds, 1), **facts_of(trainer)}
    part |= {"steps": trainer.state.global_step, "cap_gb": limit / GB}
    part |= {"predicted_gb": guess.peak / GB, "predicted_device_gb": guess.device / GB}
    Path("70b.json").write_text(json.dumps(part | found))


def facts_of(trainer) -> dict:
    """Evidence of the model's size: parameters of the base, none of them shared."""
    from bitsandbytes.nn import Params4bit

    count, places = 0, []
    for name, parameter in trainer.model.named_parameters(remove_duplicate=False):
        places.append(parameter.data_ptr())
        if ".lora_" not in name:
            packed = isinstance(parameter, Params4bit)
            count += math.prod(parameter.quant_state.shape) if packed else parameter.numel()
    return {"parameters": count, "shared_tensors": len(places) - len(set(places))}


def load_quantized(report: str) -> None:
    """Load models/quantized as train does."""
    from stages.shared.device import pick_device
    from stages.shared.model import load_base

    measure_loading(report, lambda: load_base(Path("models/quantized"), pick_device()))


def load_and_quantize(report: str) -> None:
    """Load models/base as people do without a quantize stage."""
    import torch
    from transformers import AutoModelForCausalLM

    from stages.quantize import quantization_config
    from stages.shared.device import pick_device

    measure_loading(
        report,
        lambda: AutoModelForCausalLM.from_pretrained(
            "models/base",
            quantization_config=quantization_config(True),
            dtype=torch.bfloat16,
            device_map={"": pick_device()},
        ),
    )


def measure_loading(report: str, load) -> None:
    """Seconds and peaks of `load`, imports and the CUDA context not counted in the seconds."""
    import torch

    watch, peaks = Watch(), Peaks(None)
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
    before = status("RssAnon") / GB
    started = time.monotonic()
    model = load()
    seconds = time.monotonic() - started
    held = sum(p.nbytes for p in model.parameters()) / GB
    found = {"seconds": seconds, "ram_before_gb": before, "weights_gb": held}
    Path(report).write_text(json.dumps(found | peaks.report() | watch.report()))


def loads(weights: Path) -> None:
    """The two ways to a quantized base at 7B, each in a process of its own."""
    folder = weights / RECIPES[SEED_RECIPE][0]
    for call in ("load_quantized", "load_and_quantize"):
        report, log = folder / f"{call}.json", folder / f"{call}.log"
        code = in_process(f"{call}({report.name!r})", folder, log)
        part = {"part": "load", "how": call.replace("_", " "), "card_gb": None, "exit": code}
        if code:
            part["said"] = log.read_text(encoding="utf-8").strip().splitlines()[-3:]
        else:
            part |= json.loads(report.read_text())
        save(part)


def out_of_memory(work: Path) -> None:
    """Train where it cannot fit: the outputs of the earlier run must stay as they are."""
    folder = work / f"{SEED_RECIPE}-{RECIPES[SEED_RECIPE][1][0]}"

    def outputs() -> dict[str, bytes]:
        files = [*(folder / "models/adapter").rglob("*"), *(folder / "metrics").glob("*")]
        return {str(file): file.read_bytes() for file in files if file.is_file()}

    before = outputs()
    managed = planned(folder)["managed_gb"] * GB
    found = run_stage(folder, "train", allocator_bytes(OOM_GB, managed))
    part = {"part": "oom", "card_gb": OOM_GB, "stages": [found]}
    save(part | {"outputs": len(before), "outputs_untouched": outputs() == before})
    print("\n".join(found.get("said", [])), flush=True)


def save(part: dict) -> None:
    """Put `part` into RESULTS, replacing an earlier one of its kind."""
    from benchmarks.speed import versions

    def kind(entry: dict) -> tuple:
        return tuple(entry.get(key) for key in ("part", "card_gb", "shape", "how"))

    with _saving:
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"parts": []}
        parts = [other for other in results["parts"] if kind(other) != kind(part)]
        results = {
            "device": device(),
            "date": datetime.now(UTC).date().isoformat(),
            "versions": versions(),
            "parts": [*parts, part],
        }
        partial = RESULTS.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        partial.replace(RESULTS)


def device() -> str:
    """The GPU's name, without a CUDA context in this process, which would take memory from it."""
    if not shutil.which("nvidia-smi"):
        return "CPU"
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.splitlines()[0]


def run(work: Path, weights: Path, parts: list[str]) -> None:
    work.mkdir(parents=True, exist_ok=True)
    if names := [name for name in RECIPES if name in parts]:
        recipes(work, weights, names)
    if "70b" in parts:
        # plan's parameters are read where it runs.
        copy_project(work)
        report = work / "70b.json"
        code = in_process("seventy()", work, work / "70b.log")
        said = (work / "70b.log").read_text(encoding="utf-8").strip().splitlines()
        print("\n".join(said[-3:]), flush=True)
        failed = {"part": "70b", "card_gb": 48, "exit": code, "said": said[-3:]}
        save(failed if code else json.loads(report.read_text()) | {"exit": 0})
    if "load" in parts:
        loads(weights)
    if "oom" in parts:
        out_of_memory(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--weights", type=Path, metavar="DIR")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {min(unknown)}; choose from {', '.join(PARTS)}")
    weights = options.weights or options.work
    run(options.work.resolve(), weights.resolve(), options.parts or PARTS)


if __name__ == "__main__":
    main()
