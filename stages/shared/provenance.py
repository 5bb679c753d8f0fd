"""What a result was computed with, besides its inputs: written beside it, in metrics/*_cost.json.

Where all of this is the same, the same parameters, data and code give the same bytes. No stage but
export depends on it: other versions make no result stale, and the report says which were used.
"""

import os
import platform
from importlib import metadata
from pathlib import Path

MACHINE = ("device", "processor", "instruction_set", "threads")
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "trl",
    "accelerate",
    "datasets",
    "safetensors",
    "liger-kernel",
)
ABSENT = "not installed"


def versions() -> dict[str, str]:
    """Of Python and of each package that computes, by the key that metrics have for it."""
    return {"python_version": platform.python_version()} | {
        f"{name.replace('-', '_')}_version": _version(name) for name in PACKAGES
    }


def provenance(device) -> dict[str, str | int]:
    """Flat facts about this process, which computes on the torch.device `device`."""
    import torch  # Here, since export asks for the names alone.

    return {
        "device": device_name(device),
        "processor": _processor(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        **versions(),
    }


def device_name(device) -> str:
    """The model of the GPU, or how many cores this process may use."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return f"CPU, {len(os.sched_getaffinity(0))} cores"


def made_with(cost: dict) -> dict:
    """The part of a metrics/*_cost.json that `provenance` wrote."""
    return {k: v for k, v in cost.items() if k in MACHINE or k.endswith("_version")}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ABSENT


def _processor() -> str:
    """Its name with its numbers: a virtual machine's says little without them."""
    first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    facts = {k.strip(): v.strip() for k, _, v in (x.partition(":") for x in first.splitlines())}
    name = facts.get("model name", platform.machine())
    numbers = [f"{k} {facts[k]}" for k in ("cpu family", "model", "stepping") if k in facts]
    return ", ".join([name, *numbers])
