"""Run tasks of lm-evaluation-harness on the base and on models/release.

    make harness TASKS="hellaswag arc_easy"
    make harness TASKS="my_task --include my_tasks"    # your own, as YAML files in a folder

Writes metrics/harness.json, which `compare` and the gate read like any other metrics file, with a
key such as tuned_arc_easy_acc for every metric of a task. `make harness` installs the library into
.harness (requirements-harness.lock), apart from the project's environment.
Exit status 2 if nothing could be measured.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
from pathlib import Path
from typing import Any

from stages.shared.process import StageError, sha256
from tools.revision import HARNESS
from tools.screen import fail

SIDES = {"base": Path("models/base"), "tuned": Path("models/release")}
SUMS = "SHA256SUMS"


def flat(side: str, results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The harness's results (task -> "acc,none" -> number) by keys such as tuned_arc_easy_acc."""
    found = {}
    for task, values in results.items():
        for name, value in values.items():
            metric, _, kind = name.partition(",")
            if isinstance(value, int | float) and math.isfinite(value) and kind:
                metric = metric if kind == "none" else f"{metric}_{kind}"
                found[f"{side}_{task}_{metric}"] = float(f"{value:.6g}")
    return found


def measure(options: argparse.Namespace) -> dict:
    """The results of all tasks for the base and the release, and the settings."""
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=options.include)
    if unknown := [name for name in options.tasks if not tasks.match_tasks([name])]:
        raise StageError(f"no task {unknown[0]}; lm-eval ls tasks lists them")
    cuda = torch.cuda.is_available()
    found: dict[str, Any] = {
        "limit": options.limit,
        "release_sha256": sha256(SIDES["tuned"] / SUMS),
        "lm_eval_version": importlib.metadata.version("lm-eval"),
    }
    for side, folder in SIDES.items():
        print(f"harness: {', '.join(options.tasks)} on {folder}", flush=True)
        done = simple_evaluate(
            model="hf",
            # On a CPU float16 is slow and partly unsupported.
            model_args={"pretrained": str(folder), "dtype": "auto" if cuda else "float32"},
            tasks=options.tasks,
            task_manager=tasks,
            device="cuda:0" if cuda else "cpu",
            batch_size=options.batch,
            limit=options.limit,
            apply_chat_template=options.chat,
            log_samples=False,
            bootstrap_iters=1000,
        )
        found |= flat(side, done["results"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", required=True, help="names of tasks or groups")
    parser.add_argument("--include", help="a folder with tasks of your own")
    parser.add_argument("--limit", type=int, help="examples of each task")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--chat", action="store_true", help="put the chat template around prompts")
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        if importlib.util.find_spec("lm_eval") is None:
            raise StageError(
                'lm-evaluation-harness is not installed; run it as: make harness TASKS="…"'
            )
        for folder in SIDES.values():
            if not (folder / SUMS).exists():
                raise StageError(f"{folder} does not exist; run: dvc repro")
        found = measure(options)
    except StageError as error:
        fail("harness", error)
    path = Path(HARNESS)
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"harness: wrote {path}; commit it, and python -m tools.compare shows what changed")


if __name__ == "__main__":
    main()
