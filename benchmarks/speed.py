"""Training speed and peak VRAM against Unsloth and TRL + PEFT, on one GPU and the same rows.

    python -m benchmarks.speed make --work DIR               # 7B-shaped random weights, 1,000 rows
    python -m benchmarks.speed run  --work DIR ours-packed unsloth-packed ours-packed …
    python -m benchmarks.speed run  --work DIR ours-24 unsloth-24 …   # limited to a card's memory
    python -m benchmarks.speed one  --work DIR unsloth-packed   # one side in this process
    python -m benchmarks.speed longest --work DIR ours 65536 98304   # the longest row in 24 GB
    python -m benchmarks.speed report --out speed.jsonl      # benchmarks/results/speed.json

The shape is Mistral-7B's (7.24e9 parameters), r = 64 on all seven projections; the lengths of the
rows are log-normal (median 380, 16 to 2,048 tokens), like those of guanaco-llama2-1k. Weights are
random: speed and memory are realistic, quality is not. Our figures are from the
metrics/train_cost.json of `python -m stages.train`; the other sides train with their own libraries.
Equal on all sides: rows, rank, targets, optimizer (fused AdamW), float32 adapters and moments.
tokens/s is non-padding tokens over the wall time of the epoch, including warm-up and compilation;
the peak is the allocator's plus managed memory.

A side with a number of GB is limited to a card of that size: ours by plan.vram_limit_gb, the others
by their allocator's share of the GPU, with the same memory set aside for CUDA. Unsloth then skips
checkpointing where that fits (-auto: it chooses the layers itself).

`longest` trains a step or two of one row each, r = 16, held to 24 GB, for one length after another,
each in its own process, up to the first that does not train. Unsloth (`longest unsloth …`) loads
the base of `make`; ours has random weights of the same shape and needs no files.
"""

import argparse
import importlib.metadata
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/speed.json"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPE: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
RANK, ALPHA, MAX_LENGTH, SEED = 64, 16, 2048, 7
LEARNING_RATE = 2e-4
OPTIMIZER = "adamw_torch_fused"


@dataclass(frozen=True)
class Side:
    """One way to train. `batch`: rows, or packs, a step; `row`: tokens of each of ROWS rows."""

    batch: int
    packed: bool = True
    dropout: float = 0.0
    cap_gb: int | None = None
    checkpointing: bool | str = True
    rank: int = RANK
    row: int | None = None


SIDES = {
    "ours-packed": Side(8),
    "ours-4": Side(4, packed=False),
    "reference-4": Side(4, packed=False, dropout=0.1),
    "unsloth-packed": Side(8),
    "unsloth-packed-2": Side(2),
    "unsloth-4": Side(4, packed=False),
    "ours-24": Side(2, cap_gb=24, checkpointing="auto"),
    "ours-48": Side(4, cap_gb=48, checkpointing="auto"),
    "ours-80": Side(8, cap_gb=80, checkpointing="auto"),
    "unsloth-24": Side(2, cap_gb=24, checkpointing=False),
    "unsloth-24-1": Side(1, cap_gb=24, checkpointing=False),
    "unsloth-24-auto": Side(2, cap_gb=24, checkpointing="auto"),
    "unsloth-48": Side(4, cap_gb=48, checkpointing=False),
    "unsloth-48-auto": Side(8, cap_gb=48, checkpointing="auto"),
    "unsloth-80": Side(8, cap_gb=80, checkpointing=False),
    "unsloth-80-auto": Side(8, cap_gb=80, checkpointing="auto"),
}
COMPARED = {
    "ours-packed": ("unsloth-packed", "unsloth-packed-2", "unsloth-4", "reference-4"),
    "ours-4": ("unsloth-4", "reference-4"),
    "ours-24": ("unsloth-24", "unsloth-24-1", "unsloth-24-auto"),
    "ours-48": ("unsloth-48", "unsloth-48-auto"),
    "ours-80": ("unsloth-80", "unsloth-80-auto"),
}
# Of `longest`: rows that train, memory, rank, seconds for one length, and tokens between lengths.
ROWS, ROW_CAP_GB, ROW_RANK, ROW_SECONDS, ROW_STEP = 2, 24, 16, 150, 1024
ROW_SHAPE, ROW_POSITIONS = "mistral-7b", 262144
# 6 floating-point operations a parameter and token with full checkpointing, at 760 TFLOP/s.
FLOOR_TOKENS_PER_SECOND = 17_500


def row_lengths(count: int) -> list[int]:
    draw = random.Random(SEED)
    return [
        max(16, min(MAX_LENGTH, int(draw.lognormvariate(math.log(380), 0.75))))
        for _ in range(count)
    ]


def random_rows(count: int) -> list[list[int]]:
    draw = random.Random(SEED + 1)
    vocabulary = range(3, SHAPE["vocab_size"])
    return [[1, *draw.choices(vocabulary, k=n - 2), 2] for n in row_lengths(count)]


def make(work: Path, rows: int, shape: dict) -> None:
    """Write the 16-bit model, its NF4 form by the quantize stage, and the prepared rows."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    base = work / "models/base"
    base.mkdir(parents=True)
    config = AutoConfig.for_model("mistral", bos_token_id=1, eos_token_id=2, **shape)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    print(f"speed: {sum(p.numel() for p in model.parameters())} parameters")
    model.save_pretrained(base)
    del model
    make_tokenizer(base, shape["vocab_size"])
    source = {"source": "local", "id": "random", "revision": None, "commit": None, "files": {}}
    (base / "source.json").write_text(json.dumps(source))
    make_workspace(work, rows)
    sys.path.insert(0, str(ROOT))
    from stages.shared.outputs import write_sums

    write_sums(base)
    run_stage(work, "quantize", {})


def make_tokenizer(folder: Path, vocabulary: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    ).save_pretrained(folder)


def make_workspace(work: Path, rows: int) -> None:
    """The project's stages, and rows as `prepare` writes them."""
    import pyarrow as pa

    from stages.shared.outputs import write_sums
    from stages.shared.rows import SCHEMA

    shutil.copytree(ROOT / "stages", work / "stages", dirs_exist_ok=True)
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, work / name)
    prepared = work / "data/prepared"
    (prepared / "tokenizer").mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(work / "models/base" / name, prepared / "tokenizer" / name)
    tokens = random_rows(rows)
    for name, part in (("train", tokens), ("eval", tokens[:8])):
        table = pa.Table.from_pylist(
            [
                {"row": str(i), "input_ids": ids, "labels": ids, "prompt_tokens": 1}
                | {"scored_bytes": len(ids)}
                for i, ids in enumerate(part)
            ],
            schema=SCHEMA,
        )
        with (
            pa.OSFile(str(prepared / f"{name}.arrow"), "wb") as file,
            pa.ipc.new_stream(file, SCHEMA) as writer,
        ):
            writer.write_table(table)
    (prepared / "prepared.json").write_text(json.dumps({"max_length": MAX_LENGTH}))
    write_sums(prepared)
    (work / "models/plan.ok").write_text("ok\n")


def run_stage(work: Path, stage: str, changes: dict) -> None:
    import yaml

    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for section, values in changes.items():
        params[section] |= values
    (work / "params.yaml").write_text(yaml.safe_dump(params))
    subprocess.run([sys.executable, "-m", f"stages.{stage}"], cwd=work, check=True)


def train_params(side: Side) -> dict:
    """params.yaml sections of one side, with the same numbers as the other sides."""
    return {
        "lora": {"r": RANK, "alpha": ALPHA, "dropout": side.dropout, "target_modules": TARGETS},
        "train": {
            "batch_size": side.batch,
            "learning_rate": LEARNING_RATE,
            "schedule": "constant",
            "warmup_ratio": 0.0,
            "max_grad_norm": 0.3,
            "optimizer": OPTIMIZER,
            "gradient_checkpointing": side.checkpointing,
            "batching": "packing" if side.packed else "group_by_length",
        },
    }


def ours(work: Path, side: Side) -> dict:
    plan = work / "metrics/plan.json"
    plan.parent.mkdir(exist_ok=True)
    plan.write_text(json.dumps({"vram_limit_gb": side.cap_gb}), encoding="utf-8")
    run_stage(work, "train", train_params(side))
    return json.loads((work / "metrics/train_cost.json").read_text())


def limit_to(cap_gb: float) -> None:
    """Limit this process's allocator to a card of `cap_gb`, also for those who ask for its size."""
    import torch

    from stages.shared.card import hold_to
    from stages.shared.outputs import GB

    hold_to(cap_gb * GB)
    size = torch.cuda.get_per_process_memory_fraction() * torch.cuda.mem_get_info()[1]

    def mem_get_info(device=None) -> tuple[int, int]:
        return int(size - torch.cuda.memory_reserved()), int(size)

    torch.cuda.mem_get_info = mem_get_info


def theirs(work: Path, library: str, side: Side) -> dict:
    """One epoch through trl's SFTTrainer (the reference script) or Unsloth's."""
    if library == "unsloth":
        import unsloth  # must come before trl and transformers
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    if side.cap_gb:
        limit_to(side.cap_gb)
    count = sum(1 for _ in (work / "rows.txt").open()) if (work / "rows.txt").exists() else 1000
    base, max_length, ids = work / "models/base", MAX_LENGTH, []
    if side.row:
        base, max_length = long_base(work), side.row
        draw = random.Random(SEED)
        ids = [draw.choices(range(3, SHAPE["vocab_size"]), k=side.row) for _ in range(ROWS)]
    ids = ids or random_rows(count)
    rows = Dataset.from_dict({"input_ids": ids})
    peft_config = None
    if library == "unsloth":
        model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
            str(base),
            max_seq_length=max_length,
            load_in_4bit=True,
            dtype=torch.bfloat16,
        )
        model = unsloth.FastLanguageModel.get_peft_model(
            model,
            r=side.rank,
            lora_alpha=ALPHA,
            lora_dropout=side.dropout,
            target_modules=TARGETS,
            bias="none",
            use_gradient_checkpointing="unsloth" if side.checkpointing else False,
            random_state=SEED,
            **({"checkpoint_skip_layers": "auto"} if side.checkpointing == "auto" else {}),
        )
    else:
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

        model = AutoModelForCausalLM.from_pretrained(
            base,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=torch.bfloat16,
                bnb_4bit_use_double_quant=True,
            ),
            device_map={"": 0},
            dtype=torch.bfloat16,
        )
        model.config.use_cache = False
        tokenizer = AutoTokenizer.from_pretrained(base)
        peft_config = LoraConfig(
            r=side.rank,
            lora_alpha=ALPHA,
            lora_dropout=side.dropout,
            target_modules=TARGETS,
            bias="none",
            task_type="CAUSAL_LM",
        )
    grouping: dict[str, Any] = {} if side.packed else {"train_sampling_strategy": "group_by_length"}
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=rows,
        peft_config=peft_config,
        args=SFTConfig(
            output_dir=str(work / "out"),
            num_train_epochs=1,
            per_device_train_batch_size=side.batch,
            gradient_accumulation_steps=1,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.001,
            max_grad_norm=0.3,
            optim=OPTIMIZER,
            gradient_checkpointing=bool(side.checkpointing),
            packing=side.packed,
            max_length=max_length,
            bf16=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **grouping,
        ),
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    times = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            torch.cuda.synchronize()
            times.append(time.monotonic())

        def on_step_end(self, *args, **kwargs):
            torch.cuda.synchronize()
            times.append(time.monotonic())

    trainer.add_callback(Clock())
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    tokens = sum(map(len, ids))
    paged = sum(
        value.numel() * value.element_size()
        for state in trainer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and getattr(value, "is_paged", False)
    )
    steps = len(times) - 1
    warm = min(3, steps - 1)
    return {
        "device": torch.cuda.get_device_name(),
        "train_seconds": times[-1] - times[0],
        "tokens_per_second": tokens / (times[-1] - times[0]),
        "steady_tokens_per_second": tokens * (steps - warm) / steps / (times[-1] - times[warm]),
        "peak_vram_gb": (torch.cuda.max_memory_allocated() + paged) / 1e9,
        "peak_vram_reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
    }


def one(work: Path, side: str) -> dict:
    library = side.split("-")[0]
    if library == "ours":
        return ours(work, SIDES[side])
    return theirs(work, library, SIDES[side])


def gpu_id() -> str:
    """Tells machines apart."""
    import torch

    return str(torch.cuda.get_device_properties(0).uuid)


def versions() -> dict[str, str]:
    found = {}
    optional = ("liger-kernel", "flash-attn-4", "unsloth")
    for name in ("torch", "transformers", "peft", "trl", "bitsandbytes", *optional):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment_of(side: str) -> dict[str, str]:
    environment = dict(os.environ)
    extra = environment.get("UNSLOTH_PATH")
    if side.startswith("unsloth") and extra:
        environment["PYTHONPATH"] = f"{extra}:{environment.get('PYTHONPATH', '')}"
    return environment


def run(work: Path, sides: list[str], out: Path) -> None:
    """Run each side in its own process, in the given order; append to `out` as they finish."""
    for side in sides:
        command = [sys.executable, "-m", "benchmarks.speed", "one", "--work", str(work), side]
        environment = environment_of(side)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"side"')]
        if done.returncode or not lines:
            print(f"{side}: failed: {done.stdout[-1500:]} {done.stderr[-1500:]}", flush=True)
            continue
        found = json.loads(lines[-1])
        with out.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(
            f"{side}: {found['tokens_per_second']:.0f} tokens/s "
            f"(steady {found['steady_tokens_per_second']:.0f}), {found['peak_vram_gb']:.2f} GB, "
            f"reserved {found['peak_vram_reserved_gb']:.2f} GB",
            flush=True,
        )


def long_base(work: Path) -> Path:
    """The base of `make` for longer rows: links to it, with more positions in config.json."""
    source, folder = work / "models/base", work / "models/long"
    folder.mkdir(exist_ok=True)
    for file in source.iterdir():
        if file.name != "config.json" and not (folder / file.name).exists():
            (folder / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = ROW_POSITIONS
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def row_point(tokens: int):
    """`tokens` in one row, as a point of benchmarks/placement.py."""
    from benchmarks.placement import Point

    return Point(ROW_SHAPE, ROW_RANK, tokens, rows=1, cap_gb=ROW_CAP_GB, steps=1)


def planned_row() -> int:
    """The longest row that the planner would train, in multiples of ROW_STEP; 0 for none."""
    from benchmarks.placement import sizes_for
    from stages.shared import placement
    from stages.shared.outputs import GB

    fits, too_long = 0, ROW_POSITIONS // ROW_STEP + 1
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        found = placement.choose(sizes_for(row_point(middle * ROW_STEP)), ROW_CAP_GB * GB)
        fits, too_long = (middle, too_long) if found else (fits, middle)
    return fits * ROW_STEP


def train_row(work: Path, side: str, tokens: int) -> dict:
    """Train a step of one row of `tokens` in this process; Unsloth trains ROWS."""
    if side != "ours":
        limited = Side(1, packed=False, cap_gb=ROW_CAP_GB, rank=ROW_RANK, row=tokens)
        return theirs(work, side, limited)
    from benchmarks import placement

    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    placement.POINTS["row"], placement.WARM = row_point(tokens), 0
    found, where = placement.measure_point("row")
    return {
        "device": where["device"],
        "tokens_per_second": found["tokens_per_second"],
        "steady_tokens_per_second": found["steady_tokens_per_second"],
        "peak_vram_gb": found["measured_gb"],
        "peak_vram_reserved_gb": found["reserved_gb"],
        "placement": found["placement"],
    }


def attempt(work: Path, side: str, tokens: int) -> dict:
    """train_row in its own process. `result`: trained, out of memory, or no result (and why)."""
    command = [sys.executable, "-m", "benchmarks.speed", "row", "--work", str(work), side]
    try:
        done = subprocess.run(
            [*command, str(tokens)],
            cwd=ROOT,
            env=environment_of(side),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ROW_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return {"tokens": tokens, "result": "no result", "why": f"not in {ROW_SECONDS} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"side"')]
    if lines and not done.returncode:
        return {"tokens": tokens, "result": "trained"} | json.loads(lines[-1])
    said = done.stdout + done.stderr
    if "out of memory" in said.lower():
        return {"tokens": tokens, "result": "out of memory"}
    why = [line for line in said.splitlines() if line.strip()][-1:]
    print(said[-2000:], flush=True)
    return {"tokens": tokens, "result": "no result", "why": "".join(why)[:300]}


def longest(work: Path, side: str, lengths: list[int]) -> None:
    """Try the lengths in ascending order; writes the longest row that trained into RESULTS."""
    print(f"the planner's longest row in {ROW_CAP_GB} GB: {planned_row():,} tokens", flush=True)
    attempts: list[dict] = []
    for tokens in sorted(lengths):
        attempts.append(attempt(work, side, tokens))
        print(f"{side}: {attempts[-1]}", flush=True)
        if attempts[-1]["result"] != "trained":
            break
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    settings = {"shape": ROW_SHAPE, "rank": ROW_RANK, "cap_gb": ROW_CAP_GB}
    results.setdefault("longest", {})[side] = settings | compared(attempts)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def compared(attempts: list[dict]) -> dict:
    """The longest row that trained and the first that ran out of memory, None for none."""
    lengths: dict[str, list[int]] = {}
    for tried in attempts:
        lengths.setdefault(tried["result"], []).append(tried["tokens"])
    return {
        "longest_trained": max(lengths.get("trained", []), default=None),
        "out_of_memory": min(lengths.get("out of memory", []), default=None),
        "attempts": attempts,
    }


def ratios(runs: list[dict]) -> list[dict]:
    """Ratios of our rate to the others', by medians over the runs on one machine."""
    sides: dict[str, list[dict]] = {}
    for found in runs:
        sides.setdefault(found["side"], []).append(found)

    def ratio(ours: str, other: str, key: str) -> float:
        one, another = (statistics.median(r[key] for r in sides[name]) for name in (ours, other))
        return one / another

    return [
        {
            "gpu": runs[0]["gpu"],
            "sides": [ours, other],
            "runs": [len(sides[ours]), len(sides[other])],
            "ratio": ratio(ours, other, "tokens_per_second"),
            "steady_ratio": ratio(ours, other, "steady_tokens_per_second"),
        }
        for ours, others in COMPARED.items()
        for other in others
        if ours in sides and other in sides
    ]


def report(file: Path) -> None:
    """Write RESULTS from the lines of `run`: the median of each side, its runs and their spread."""
    runs = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    sides = {}
    for side in dict.fromkeys(found["side"] for found in runs):
        of_side = [found for found in runs if found["side"] == side]
        sides[side] = {"runs": len(of_side)}
        for key in ("tokens_per_second", "steady_tokens_per_second", "peak_vram_gb"):
            values = sorted(found[key] for found in of_side)
            sides[side][key] = statistics.median(values)
            sides[side][f"{key}_range"] = [values[0], values[-1]]
    results = {
        "date": max(found["date"] for found in runs),
        "device": runs[0]["device"],
        "shape": "mistral-7b, random weights, r = 64 on seven projections, 1,000 rows",
        "order": [found["side"] for found in runs],
    }
    results["ratios"] = [
        found
        for gpu in dict.fromkeys(r["gpu"] for r in runs)
        for found in ratios([r for r in runs if r["gpu"] == gpu])
    ]
    names = {"": "ours-packed", "unsloth_": "unsloth-packed", "reference_": "reference-4"}
    for prefix, side in names.items():
        if side in sides:
            results[f"{prefix}tokens_per_second"] = sides[side]["tokens_per_second"]
            results[f"{prefix}peak_vram_gb"] = sides[side]["peak_vram_gb"]
    if "ours-packed" in sides:
        steady = sides["ours-packed"]["steady_tokens_per_second"]
        results["share_of_floor"] = steady / FLOOR_TOKENS_PER_SECOND
    results |= {"sides": sides, "runs": runs}
    before = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results |= {key: before[key] for key in ("longest",) if key in before}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in results.items() if k != "runs"}, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["make", "run", "one", "longest", "row", "report"])
    parser.add_argument("sides", nargs="*", metavar="side", help=", ".join(SIDES))
    parser.add_argument("--work", type=Path, help="needed for all but report")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--hidden", type=int, default=SHAPE["hidden_size"])
    parser.add_argument("--out", type=Path, default=Path("speed.jsonl"))
    args = parser.parse_intermixed_args()
    if args.action == "report":
        report(args.out)
        return
    if args.work is None:
        parser.error("--work DIR is missing")
    work = args.work.resolve()
    if args.action == "make":
        shape = SHAPE | {"num_hidden_layers": args.layers, "hidden_size": args.hidden}
        make(work, args.rows, shape)
        (work / "rows.txt").write_text("\n" * args.rows)
    elif args.action == "run":
        run(work, args.sides, args.out.resolve())
    elif args.action == "longest":
        longest(work, args.sides[0], [int(tokens) for tokens in args.sides[1:]])
    else:
        side = args.sides[0]
        made = (
            one(work, side) if args.action == "one" else train_row(work, side, int(args.sides[1]))
        )
        found = {"side": side} | made
        date = {"date": datetime.now(UTC).date().isoformat()}
        print(json.dumps(found | date | {"gpu": gpu_id()} | versions()))


if __name__ == "__main__":
    main()
