"""The effect of replay: the default pipeline with 0, 1 and 5 % of general rows mixed in.

    pip install --no-deps chatterbot-corpus==1.3.3
    python -m benchmarks.replay --work DIR

Real weights and data. Each share is trained at the default's learning rate and, with two seeds, at
a higher one at which the default forgets. The number of rows is constant: replayed rows replace
rows of the task. Each run is scored on the task's held-out rows and the retention text, and so is
the base, once. Results in DIR are reused. Writes benchmarks/results/replay.json after every run:
perplexities, their change from the base in percent, and for both sets `…_p` of a paired bootstrap
against the run without replay.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/replay.json"
SHARES = (0.0, 0.01, 0.05)
GENERAL = {"source": "pypi", "id": "chatterbot-corpus", "revision": "1.3.3"}
READ = {"config": None, "split": None, "format": "auto", "columns": None}
# Learning rate, seed.
TRAINED = ((2e-3, 42), (6e-3, 42), (6e-3, 43))
SHARED = ("fetch_model", "fetch_retention", "quantize")
OWN = ("fetch_data", "prepare", "plan", "train")
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes")


def workspace(folder: Path, share: float, learning_rate: float, seed: int) -> None:
    """The project's code in `folder`, with the run's params.yaml."""
    for name in ("stages", "templates"):
        shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True)
    (folder / "data/source").mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "dvc.yaml", folder)
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["seed"], params["train"]["learning_rate"] = seed, learning_rate
    if share:
        params["dataset"]["mix"] = [GENERAL | READ | {"share": share}]
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")


def run_stages(folder: Path, stages: tuple[str, ...]) -> None:
    with (folder / "log.txt").open("a") as log:
        for stage in stages:
            command = [sys.executable, "-m", f"stages.{stage}"]
            subprocess.run(command, cwd=folder, check=True, stdout=log, stderr=subprocess.STDOUT)


def score_sets(folder: Path, adapter: bool) -> dict:
    """Set -> [NLL of each row, tokens of each row], of the base or with the folder's adapter."""
    import torch
    from transformers import AutoTokenizer

    from stages.evaluating.retention import retention_rows
    from stages.shared.model import load_adapter, load_base
    from stages.shared.rows import read_rows
    from stages.shared.scoring import score

    tokenizer = AutoTokenizer.from_pretrained(folder / "data/prepared/tokenizer")
    tokens = yaml.safe_load((folder / "params.yaml").read_text())["retention"]["tokens"]
    sets = {
        "task": read_rows(folder / "data/prepared/eval.arrow"),
        "retention": retention_rows(folder / "data/retention", tokenizer, tokens),
    }
    model = load_base(folder / "models/quantized", torch.device("cpu"))
    tuned = load_adapter(model, folder / "models/adapter") if adapter else model
    scored = {name: score(tuned, rows) for name, rows in sets.items()}
    return {name: [scores.nll, scores.tokens] for name, scores in scored.items()}


def kept_scores(folder: Path, adapter: bool) -> dict:
    """`score_sets`, computed once."""
    file = folder / "scores.json"
    if not file.exists():
        file.write_text(json.dumps(score_sets(folder, adapter)), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def figures(scores: dict, base: dict, without: dict) -> dict:
    """Perplexities of a run's sets, from the `kept_scores` of the run, of the base and of the run
    without replay."""
    from stages.evaluating.bootstrap import p_value
    from stages.shared.scoring import Scores

    found: dict[str, float] = {}
    for name in scores:
        before, after = (Scores(*each[name]).perplexity for each in (base, scores))
        found |= {f"{name}_base_perplexity": before, f"{name}_tuned_perplexity": after}
        found[f"{name}_change_percent"] = 100 * (after / before - 1)
        own, other = scores[name][0], without[name][0]
        if own != other:
            found[f"{name}_p"] = p_value([a - b for a, b in zip(own, other, strict=True)])
    return {key: float(f"{value:.6g}") for key, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work.resolve()
    shared = work / "shared"
    if not (shared / "models/quantized").exists():
        workspace(shared, SHARES[0], *TRAINED[0])
        run_stages(shared, (*SHARED, "fetch_data", "prepare"))
    base = kept_scores(shared, adapter=False)
    runs = []
    for rate, seed in TRAINED:
        kept: dict[float, dict] = {}
        for share in SHARES:
            folder = work / f"{rate:g}-{seed}-{share:g}"
            if not (folder / "models/adapter").exists():
                shutil.rmtree(folder, ignore_errors=True)
                workspace(folder, share, rate, seed)
                for name in ("data/retention", "models/tokenizer", "models/quantized"):
                    shutil.copytree(shared / name, folder / name, copy_function=os.link)
                run_stages(folder, OWN)
            kept[share] = kept_scores(folder, adapter=True)
            data = json.loads((folder / "metrics/data.json").read_text(encoding="utf-8"))
            run = {"learning_rate": rate, "seed": seed, "share": share}
            run |= {"train_rows": data["train_examples"]}
            run |= {"general_rows": data.get("source_1_train_examples", 0)}
            run |= {"general_tokens": data.get("source_1_train_tokens", 0)}
            runs.append(run | figures(kept[share], base, kept[SHARES[0]]))
            result = {
                "date": datetime.now(UTC).date().isoformat(),
                "device": "cpu",
                "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
                "general": GENERAL,
                "runs": runs,
            }
            RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(runs[-1]), flush=True)


if __name__ == "__main__":
    main()
