"""The environment of a result, written to metrics/*_cost.json.

In the same environment, the same parameters, data and code give the same bytes. Only export depends
on it: new versions make no other result stale, and the report says which were used.
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
    "flash-attn-4",
)
ABSENT = "not installed"


def versions() -> dict[str, str]:
    """Metric key -> version of Python and of each package that affects results."""
    return {"python_version": platform.python_version()} | {
        f"{name.replace('-', '_')}_version": version_of(name) for name in PACKAGES
    }


def provenance(device) -> dict[str, str | int]:
    """Flat facts about this process, which computes on the torch.device `device`."""
    import torch  # Here, since export only needs the names.

    return {
        "device": device_name(device),
        "processor": _processor(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        **versions(),
    }


def device_name(device) -> str:
    """The GPU model, or the number of cores that this process may use."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return f"CPU, {len(os.sched_getaffinity(0))} cores"


def made_with(cost: dict) -> dict:
    """The part of a metrics/*_cost.json that `provenance` wrote."""
    return {k: v for k, v in cost.items() if k in MACHINE or k.endswith("_version")}


def version_of(package: str) -> str:
    """The installed version, or ABSENT."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ABSENT


def _processor() -> str:
    """Name, family, model and stepping; on a virtual machine the name alone says little."""
    first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    facts = {k.strip(): v.strip() for k, _, v in (x.partition(":") for x in first.splitlines())}
    name = facts.get("model name", platform.machine())
    numbers = [f"{k} {facts[k]}" for k in ("cpu family", "model", "stepping") if k in facts]
    return ", ".join([name, *numbers])
