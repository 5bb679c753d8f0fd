"""What the pages for people name is there: files, commands, and constants in the files named."""

import json
import re

import pytest
from tiny import ROOT

PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/data.md",
    "docs/evaluation.md",
    "docs/memory.md",
    "docs/recovery.md",
    "docs/scale.md",
)
FOLDERS = "stages|tools|tests|benchmarks|recipes|templates|docs|metrics|\\.github"
MADE = ("metrics/", "templates/NAME", "stages/NAME", "tests/NAME")


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_files_are_there(page):
    named = set(re.findall(rf"(?<![\w./-])(?:{FOLDERS})/[\w./-]*\w/?", text(page)))
    assert [f for f in named if not f.startswith(MADE) and not (ROOT / f).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_there(page):
    modules = set(re.findall(r"python -m ((?:stages|tools|benchmarks)\.\w+)", text(page)))
    files = {module: ROOT / f"{module.replace('.', '/')}.py" for module in modules}
    assert [module for module, file in files.items() if not file.exists()] == []
    makefile = (ROOT / "Makefile").read_text()
    verbs = set(re.findall(r"(?:\$ |`)make ([a-z-]+)", text(page)))
    assert [verb for verb in verbs if f"\n{verb}:" not in makefile] == []


def test_the_figures_of_replay_are_those_that_were_measured():
    found = json.loads(text("benchmarks/results/replay.json"))
    assert len(found["runs"]) > 5
    for run in found["runs"]:
        p = run.get("retention_p")
        cells = [
            f"{run['learning_rate']:g}, {run['seed']}",
            f"{run['share']:.0%} ({run['general_rows']})",
            f"{run['task_tuned_perplexity']:.2f}",
            f"{run['retention_tuned_perplexity']:.2f}",
            f"{run['retention_change_percent']:+.1f} %",
            "" if p is None else "< 0.01" if p < 0.01 else f"{p:.2g}",
        ]
        assert f"| {' | '.join(cells)} |" in text("docs/data.md"), cells


def test_constants_are_where_contributing_says():
    named = re.findall(r"`(\w[\w.]*)`\s+in\s+`([\w/]+\.py)`", text("CONTRIBUTING.md"))
    assert len(named) > 5
    for name, file in named:
        # `Prepare.format` is a class and what stands in it.
        for part in name.split("."):
            assert re.search(rf"\b{part}\b", text(file)), f"{file} has no {name}"
