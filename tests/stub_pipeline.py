"""A repository whose two stages turn params into metrics in milliseconds, run by the real DVC."""

import importlib
import io
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

from dvc.repo import Repo
from tiny import ROOT

from tools.revision import Revision

DVC_YAML = """\
stages:
  evaluate:
    cmd: exec python evaluate.py
    deps: [evaluate.py, templates]
    params: [seed, train, results]
    outs: [adapter]
    metrics:
    - metrics/eval.json: {cache: false}
    - metrics/verify.json: {cache: false}
    - metrics/train_cost.json: {cache: false}
  merge:
    cmd: exec python merge.py
    deps: [adapter, merge.py]
    outs:
    - merged: {push: false}
"""
MERGE = """\
import pathlib, shutil
pathlib.Path("merged").mkdir()
weights = pathlib.Path("adapter/weights").read_text()
pathlib.Path("merged/weights").write_text("merged with " + weights)
shutil.copyfile("adapter/tokenizer", "merged/tokenizer")
"""
STAGE = """\
import json, pathlib
from ruamel.yaml import YAML
params = YAML(typ="safe").load(open("params.yaml"))
results, luck = params["results"], (params["seed"] - 42) / 100
evaluation = {
    "base_perplexity": 73.0, "tuned_perplexity": results["tuned"] + luck,
    "eval_tokens": 4211, "eval_set_sha256": results["set"],
}
if results["group"] is not None:
    evaluation["group_tuned_perplexity"] = results["group"]
verify = {"perplexity_change_percent": 0.01, "token_agreement": 0.999, "nonfinite_values": 0}
cost = {"train_seconds": results["seconds"], "tokens_per_second": 80.0, "device": "CPU"}
pathlib.Path("metrics").mkdir(exist_ok=True)
for name, values in {"eval": evaluation, "verify": verify, "train_cost": cost}.items():
    pathlib.Path(f"metrics/{name}.json").write_text(json.dumps(values))
pathlib.Path("adapter").mkdir()
pathlib.Path("adapter/weights").write_text(str(params))
pathlib.Path("adapter/tokenizer").write_text("tokenizer")
"""
PARAMS = """\
seed: 42
train:
  learning_rate: 2.0e-3
  note: a | b
results: {tuned: 12.0, group: 14.0, set: "aaaa", seconds: 100.0}
"""
GATE = """\
metrics/eval.json:
  tuned_perplexity: {may_rise_percent: 10}
  group_tuned_perplexity: {may_rise_percent: 10}
metrics/verify.json:
  perplexity_change_percent: {at_least: -1, at_most: 1}
  token_agreement: {at_least: 0.95}
  nonfinite_values: {at_most: 0}
"""


class Texts(Revision):
    """A revision made of texts: path -> content."""

    prefix = ""

    def __init__(self, name: str, texts: dict[str, str]):
        self.name, self.commit, self.texts = name, name.encode().hex(), texts

    @property
    def files(self) -> dict[str, str]:
        return self.texts

    def bytes(self, path: str) -> bytes | None:
        return self.texts[path].encode() if path in self.texts else None


def run(folder: Path, *command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def must(folder: Path, *command: str) -> str:
    done = run(folder, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tool(folder: Path, name: str, *arguments: str) -> subprocess.CompletedProcess:
    """`python -m tools.NAME` as a person runs it in `folder`, without the start of a process."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    argv = patch.object(sys, "argv", [name, *arguments])
    with chdir(folder), redirect_stdout(out), redirect_stderr(err), argv:
        try:
            importlib.import_module(f"tools.{name}").main()
        except SystemExit as end:
            status = end.code or 0
            if isinstance(status, str):
                print(status, file=err)
                status = 1
    return subprocess.CompletedProcess([name, *arguments], status, out.getvalue(), err.getvalue())


def make(folder: Path, top: Path | None = None) -> Path:
    """The repository with one run committed on the branch main; its top may lie above `folder`."""
    top = top or folder
    folder.mkdir(exist_ok=True)
    (folder / "templates").mkdir()
    for name, text in {
        "dvc.yaml": DVC_YAML,
        "evaluate.py": STAGE,
        "merge.py": MERGE,
        "templates/chat": "{prompt}",
        "params.yaml": PARAMS,
        "gate.yaml": GATE,
        ".gitignore": "/adapter\n/merged\n/tools\n/stages\n",
    }.items():
        (folder / name).write_text(text)
    # The tools under test, as they are: links, so that nothing is tested stale.
    for name in ("tools", "stages"):
        (folder / name).symlink_to(ROOT / name)
    must(top, "git", "init", "-q", "-b", "main")
    Repo.init(str(top)).close()
    (top / ".dvc/config").write_text("[core]\n    autostage = false\n")
    must(top, "git", "add", "-A")
    must(top, "git", "commit", "-qm", "pipeline")
    must(folder, "git", "tag", "no-metrics")
    reproduce(folder, "first run")
    return folder


def reproduce(folder: Path, message: str) -> None:
    """`dvc repro`, without the start of a process, and a commit."""
    with chdir(folder), Repo() as repo:
        repo.reproduce()
    must(folder, "git", "add", "-A")
    must(folder, "git", "commit", "-qm", message)


def branch(folder: Path, name: str, **edits: tuple[str, str]) -> None:
    """Start branch `name` at main; `edits` maps a file's name (`_` for `.`) to (old, new) text."""
    must(folder, "git", "checkout", "-q", "-b", name, "main")
    for key, (old, new) in edits.items():
        edit(folder / key.replace("_", "."), old, new)


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.unlink()
    file.write_text(text.replace(old, new))
