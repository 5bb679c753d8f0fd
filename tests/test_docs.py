"""Pages for people: the files, commands and constants that they name exist."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys

import pytest
import quick
import yaml
from dvc.cli.parser import get_main_parser
from dvc.utils.hydra import apply_overrides
from page_commands import blocks, fault, simple
from tiny import ROOT

from tools.picture import drawn, memory_text

PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")),
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


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_right_or_marked(page, tmp_path):
    for block in blocks(page):
        if block.mark == "run":
            assert (ROOT / block.why).exists(), block
        for line in block.commands:
            for words in simple(line):
                found = fault(words, tmp_path)
                if found != "unknown" or block.mark != "not run":
                    assert found is None, f"{page}: {line}"


WRONG = {
    "dvc exp run -S lora.rank=64": "Could not override 'lora.rank'",
    "dvc exp run --queue -S 'lora.r=8,none'": "lora.r: ",
    "dvc exp run --quene": "parser error",
    "dvc repro quantise": "no stage quantise",
    "make reprot": "No rule to make target 'reprot'",
    "python -m tools.nothing": "no module tools.nothing",
    "python -m tools.compare --bass main": "tools.compare has no --bass",
    "pytest tests/test_nothing.py": "no tests/test_nothing.py",
    "A=1 nvidia-smi": "unknown",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_is_found(line, tmp_path):
    assert WRONG[line] in fault(*simple(line), tmp_path)


def test_constants_are_where_contributing_says():
    named = re.findall(r"`(\w[\w.]*)`\s+in\s+`([\w/]+\.py)`", text("CONTRIBUTING.md"))
    assert len(named) > 5
    for name, file in named:
        # `Prepare.format` names a class and one of its fields.
        for part in name.split("."):
            assert re.search(rf"\b{part}\b", text(file)), f"{file} has no {name}"


@pytest.mark.parametrize("page", PAGES)
def test_figures_end_where_they_began(page):
    """Or a comment that is less indented would end the list that it stands in."""
    marks = re.findall(r"^( *)<!--\[\[\[(?:cog|end)", text(page), re.MULTILINE)
    assert marks[::2] == marks[1::2]


def test_figures_are_those_of_the_results():
    own, shipped = (
        yaml.safe_load((ROOT / file).read_text()) for file in ("params.yaml", "tests/params.yaml")
    )
    # On a CPU it changes nothing.
    own["train"]["gradient_checkpointing"] = shipped["train"]["gradient_checkpointing"]
    if own != shipped:
        pytest.skip("metrics/ is of other parameters than the default's")
    command = [sys.executable, "-m", "benchmarks.figures", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", text(page)):
            assert (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"


def test_the_readme_stays_short():
    assert len(text("README.md").splitlines()) <= 150


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/data.md"])
def test_own_rows_are_prepared_as_the_pages_say(page, finished, tmp_path):
    [(copy, command)] = [
        block.commands for block in blocks(page) if block.why == "tests/test_docs.py"
    ]
    folder = shutil.copytree(finished, tmp_path / "project", symlinks=True)
    [[_, file, target]], [words] = simple(copy), simple(command)
    names = ("question", "answer") if file.endswith(".csv") else ("prompt", "completion")
    rows = [(f"Show item {i} of box {i % 7}", f"get --item {i}") for i in range(60)]
    made = io.StringIO()
    if file.endswith(".csv"):
        csv.writer(made).writerows([names, *rows])
    else:
        made.writelines(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)
    (folder / target / file).write_text(made.getvalue())
    given = get_main_parser().parse_args(words[1:])
    apply_overrides(folder / "params.yaml", given.set_param)
    for stage in ("fetch_data", "prepare"):
        said = quick.run(stage, folder).said
    assert "training 24" in said


def test_the_picture_of_the_memory_table_is_what_plan_prints():
    made = drawn(memory_text())
    assert "GPU memory needed" in made
    assert text("docs/memory.svg") == made, "run: python -m tools.picture memory"
