"""Memory and time of the streamed merge at sizes that do not fit in memory.

    python -m benchmarks.merge --work DIR llama-2-7b llama-3-70b-1 llama-3-70b-2
    python -m benchmarks.merge --work DIR --verify 100 --devices cuda cpu llama-2-7b

For each shape: creates NF4 weights and an adapter (r = 16, all linear layers) in DIR, runs
`python -m stages.merge` and measures the peak resident memory and wall time of that process,
including hashing, imports and syncs. For comparison, the time to write as many bytes with fsync to
the same disk, the faster of one write before and one after the merge. Then PEFT merges the same
adapter in memory, if it fits, and every tensor is compared bit for bit (`bit_equal`). With two
devices their results are compared in units in the last place. With --verify, the checks of
`stages.verify` run on the first device's result and ROWS rows of 512 random tokens, with wall time
and peak memory. On a GPU both stages may reserve VRAM_LIMIT_GB.

Weights are random and equal in all layers; models/base is a sparse file, of which a merge into the
dequantized base reads only the header. The 70B shape has one or two layers, since memory does not
grow with their number. Adds its figures to benchmarks/results/merge.json.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from stages.shared.outputs import write_sums
from stages.shared.provenance import device_name
from stages.shared.weights import LETTERS, SINGLE, Weights

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/merge.json"
RANK = 16
SEVEN = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
SEVENTY = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
SHAPES = {
    "llama-2-7b-2": SEVEN | {"num_hidden_layers": 2},
    "llama-2-7b-16": SEVEN | {"num_hidden_layers": 16},
    "llama-2-7b": SEVEN | {"num_hidden_layers": 32},
    "llama-3-70b-1": SEVENTY | {"num_hidden_layers": 1},
    "llama-3-70b-2": SEVENTY | {"num_hidden_layers": 2},
}
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors")


def make(work: Path, shape: dict) -> int:
    """Write models/base (sparse), models/quantized and models/adapter. Returns the parameters."""
    config = AutoConfig.for_model("llama", dtype="bfloat16", **shape)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name in ("base", "quantized", "adapter"):
        (work / "models" / name).mkdir(parents=True)
    write_sparse(work / "models/base" / SINGLE, shapes)
    config.save_pretrained(work / "models/base")
    # A merge on the dequantized base asks for the small files' sums only.
    write_sums(work / "models/base", {SINGLE: 64 * "0"})
    config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    config.save_pretrained(work / "models/quantized")
    write_quantized(work / "models/quantized", shapes, linear)
    write_adapter(work / "models/adapter", shapes, linear)
    shutil.copyfile(ROOT / "params.yaml", work / "params.yaml")
    shutil.copyfile(ROOT / "dvc.yaml", work / "dvc.yaml")
    shutil.copytree(ROOT / "stages", work / "stages")
    return sum(torch.Size(s).numel() for s in shapes.values())


def write_sparse(file: Path, shapes: dict) -> None:
    """A sparse safetensors file of zeros in bfloat16."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * 2
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)


def write_quantized(folder: Path, shapes: dict, linear: set[str]) -> None:
    """NF4 as `quantize` writes it, a file a layer; each distinct shape is quantized once."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made, files = {}, {}
    for name, shape in shapes.items():
        if shape not in made:
            weight = torch.randn(shape, device=device).mul_(0.02).bfloat16()
            if name.removesuffix(".weight") in linear:
                packed, state = bnb.quantize_4bit(
                    weight, quant_type="nf4", compress_statistics=True
                )
                made[shape] = {"": packed.cpu()}
                for key, value in state.as_dict(packed=True).items():
                    made[shape][f".{key}"] = value.cpu()
            else:
                made[shape] = {"": weight.cpu()}
        layer = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(layer, {})
        files[layer] |= {name + part: value.clone() for part, value in made[shape].items()}
    weight_map = {}
    for layer, tensors in files.items():
        save_file(tensors, folder / f"model-{layer}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, f"model-{layer}.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    write_sums(folder)


def write_adapter(folder: Path, shapes: dict, linear: set[str]) -> None:
    torch.manual_seed(1)
    tensors = {}
    for module in sorted(linear):
        rows, columns = shapes[f"{module}.weight"]
        key = f"base_model.model.{module}.lora"
        tensors[f"{key}_A.weight"] = torch.randn(RANK, columns) * 0.01
        tensors[f"{key}_B.weight"] = torch.randn(rows, RANK) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted({module.rsplit(".")[-1] for module in linear}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    # No text passes through: the tokenizer's files are only copied.
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    write_sums(folder)


def plain_write(file: Path, size: int) -> float:
    """Seconds to write `size` bytes, of memory, with fsync."""
    block = torch.randint(0, 256, (2**26,), dtype=torch.uint8).numpy().data
    os.sync()
    start = time.perf_counter()
    with file.open("wb") as out:
        for offset in range(0, size, len(block)):
            out.write(block[: size - offset])
        out.flush()
        os.fsync(out.fileno())
    seconds = time.perf_counter() - start
    file.unlink()
    return seconds


# Limit of the stage's memory: a card of 24 GB minus the CUDA context.
VRAM_LIMIT_GB = 23
CAP = f"""import json, random, runpy, sys
import torch
if torch.cuda.is_available():
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction({VRAM_LIMIT_GB}e9 / total)
"""
MERGE = """runpy.run_module("stages.merge", run_name="__main__", alter_sys=True)
found = None
"""
VERIFY = """from stages import verify
draw = random.Random(0)
rows = [[draw.randrange(32000) for _ in range(512)] for _ in range(int(sys.argv[1]))]
rows = [{"input_ids": row, "labels": row} for row in rows]
found = verify.verify(verify.load_params(), rows, verify.pick_device())
"""
PEAK = """vram = torch.cuda.max_memory_reserved() / 1e9 if torch.cuda.is_available() else None
print(json.dumps([vram, found]))"""
# A process inherits the peak of its parent, so a small one starts the stage and prints its peak in
# KiB.
STARTER = """import os, subprocess, sys
process = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]])
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss)
sys.exit(status != 0)"""


def run(work: Path, device: str, code: str, *arguments: str) -> tuple[dict, dict | None]:
    """Run `code` in its own process. Returns its wall time and peaks, and what it found."""
    os.sync()
    start = time.perf_counter()
    output = subprocess.run(
        [sys.executable, "-c", STARTER, CAP + code + PEAK, *arguments],
        cwd=work,
        env=os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.splitlines()
    seconds = time.perf_counter() - start
    vram, found = json.loads(output[-2])
    cost = {"peak_ram_gb": round(int(output[-1]) * 1024 / 1e9, 3), "seconds": round(seconds, 1)}
    return cost | ({"peak_vram_reserved_gb": round(vram, 3)} if vram is not None else {}), found


def peft_merge_differs(work: Path, device: str) -> int:
    """Tensors of PEFT's merge in memory, on `device`, that are not bit-equal to models/merged."""
    from peft import PeftModel

    models = work / "models"
    model = AutoModelForCausalLM.from_pretrained(models / "quantized", device_map={"": device})
    model = model.dequantize(dtype=torch.float16)
    model = PeftModel.from_pretrained(model.to(torch.float16), models / "adapter")
    state = model.merge_and_unload(safe_merge=False).state_dict()
    merged = Weights(models / "merged")
    return sum(not torch.equal(merged.read(n).to(device), state[n]) for n in merged.names)


def last_places(a: Path, b: Path) -> tuple[int, float]:
    """Largest distance of two merged models in units in the last place, and the share that differs.

    Equal bits of two 16-bit floats are 0 apart, neighbours 1, across zero too.
    """
    first, second, largest, differing, total = Weights(a), Weights(b), 0, 0, 0
    for name in first.names:
        x, y = (w.read(name).view(torch.int16).int() for w in (first, second))
        x, y = (torch.where(v < 0, -(v & 0x7FFF), v) for v in (x, y))
        distance = (x - y).abs_()
        largest = max(largest, int(distance.max()))
        differing += int(distance.count_nonzero())
        total += distance.numel()
    return largest, differing / total


def measure(work: Path, name: str, device: str) -> dict:
    shape = SHAPES[name]
    parameters = make(work, shape)
    size = parameters * torch.float16.itemsize
    before = plain_write(work / "plain", size)
    cost, _ = run(work, device, MERGE)
    after = plain_write(work / "plain", size)
    result = {
        "shape": name,
        "layers": shape["num_hidden_layers"],
        "parameters": parameters,
        "written_gb": round(size / 1e9, 3),
        "type": LETTERS[torch.float16],
        "device": device_name(torch.device(device)),
        **cost,
        "copy_seconds": round(min(before, after), 1),
        "bit_equal": None,
    }
    # PEFT holds the model and, while it merges, much of a second one.
    if 2 * size < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        result["bit_equal"] = peft_merge_differs(work, device) == 0
    result["versions"] = {p: importlib.metadata.version(p) for p in PACKAGES}
    result["versions"]["python"] = platform.python_version()
    return result | {"date": datetime.date.today().isoformat()}


def record(result: dict) -> None:
    """Add a result, replacing an earlier one of the same shape and device."""
    key = ("shape", "device")
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    kept = [r for r in old if any(r[k] != result[k] for k in key)]
    ordered = sorted([*kept, result], key=lambda r: [r[k] for k in key])
    RESULTS.write_text(json.dumps(ordered, indent=2) + "\n")
    print(json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--work", type=Path, required=True, help="an empty folder on a large disk")
    parser.add_argument("--devices", nargs="+", choices=("cpu", "cuda"), default=["cpu"])
    parser.add_argument("--verify", type=int, metavar="ROWS", help="verify too, on 512 tokens each")
    arguments = parser.parse_args()
    for name in arguments.shapes:
        folders = []
        for device in arguments.devices:
            folders.append(arguments.work / f"{name}-{device}")
            result = measure(folders[-1], name, device)
            if device == arguments.devices[0]:
                if arguments.verify:
                    cost, metrics = run(folders[-1], device, VERIFY, str(arguments.verify))
                    result |= {f"verify_{key}": value for key, value in cost.items()}
                    result |= {"verify_rows": arguments.verify, "verify_metrics": metrics}
            else:
                ulps = last_places(*(folder / "models/merged" for folder in folders))
                result["max_last_places_apart"], result["share_apart"] = ulps
            record(result)
        for folder in folders:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
