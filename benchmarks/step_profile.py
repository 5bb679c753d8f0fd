"""Where the time of a training step goes on an NVIDIA GPU.

    python -m benchmarks.step_profile NAME ...   # points of benchmarks.placement

One step of a point is recorded by torch.profiler; its duration is the median of the steps that are
not. Kernels are grouped by name, matrix products by the shapes of their factors. Writes
benchmarks/results/profile.json after every point.
"""

import argparse
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import placement
from benchmarks.vram import alone

RESULTS = Path("benchmarks/results/profile.json")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::_grouped_mm")
KERNELS = {
    "attention": ("flash", "fmha", "softmax"),
    "dequantization": ("dequantize", "Dequantize"),
    "copies": ("Memcpy",),
}
PROFILED = placement.WARM + 2


def grouped(events: Iterable[Any], rank: int) -> dict[str, float]:
    """Seconds of the GPU by group, of averages grouped by the shapes of inputs.

    A product whose smallest dimension is that of at most three stacked adapters is an adapter's.
    """
    found = dict.fromkeys(("base products", "adapter products", *KERNELS, "other kernels"), 0.0)
    for event in events:
        seconds = event.self_device_time_total / 1e6
        if event.key in PRODUCTS:
            smallest = min(size for shape in event.input_shapes for size in shape)
            found["adapter products" if smallest <= 3 * rank else "base products"] += seconds
        elif event.device_type.name != "CPU" and not event.is_user_annotation:
            named = [k for k, parts in KERNELS.items() if any(p in event.key for p in parts)]
            found[named[0] if named else "other kernels"] += seconds
    # The kernels of products are listed beside the operations that started them.
    found["other kernels"] -= found["base products"] + found["adapter products"]
    return found


def profile(name: str) -> dict:
    """The point with the seconds of its step by group, and the environment."""
    import torch
    from torch.profiler import ProfilerActivity
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == PROFILED:
                both = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
                self.profiler = torch.profiler.profile(activities=both, record_shapes=True)
                self.profiler.__enter__()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == PROFILED + 1:
                torch.cuda.synchronize()
                self.profiler.__exit__(None, None, None)

    recorder, point = Recorder(), placement.POINTS[name]
    found, where = placement.measure_point(name, recorder)
    groups = grouped(recorder.profiler.key_averages(group_by_input_shape=True), point.rank)
    step = point.tokens * point.accumulation / found["steady_tokens_per_second"]
    computing = sum(seconds for group, seconds in groups.items() if group != "copies")
    return {
        "name": name,
        "step_seconds": step,
        "computing_seconds": computing,
        "idle_seconds": max(0.0, step - computing),
        "seconds": groups,
        "tokens_per_step": point.tokens * point.accumulation,
        "placement": found["placement"],
        "fast_path": found["fast_path"],
    } | where


def main() -> None:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    saved = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"points": []}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=placement.POINTS, metavar="NAME")
    for name in parser.parse_args().names:
        found = alone(profile, name)
        key = (name, found["fast_path"])
        others = [p for p in saved["points"] if (p["name"], p["fast_path"]) != key]
        saved["points"] = [*others, found]
        RESULTS.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: a step of {1000 * found['step_seconds']:.0f} ms")
        for group, seconds in found["seconds"].items():
            print(f"  {1000 * seconds:7.1f} ms  {group}")


if __name__ == "__main__":
    main()
