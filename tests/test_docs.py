"""What the pages for people name is there: files, commands, and constants in the files named."""

import re

import pytest
from tiny import ROOT

PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/evaluation.md",
    "docs/memory.md",
    "docs/recovery.md",
    "docs/scale.md",
    "docs/serving.md",
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


def test_constants_are_where_contributing_says():
    named = re.findall(r"`(\w[\w.]*)`\s+in\s+`([\w/]+\.py)`", text("CONTRIBUTING.md"))
    assert len(named) > 5
    for name, file in named:
        # `Prepare.format` is a class and what stands in it.
        for part in name.split("."):
            assert re.search(rf"\b{part}\b", text(file)), f"{file} has no {name}"
