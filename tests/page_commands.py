"""The commands of the pages for people, and whether what they name exists.

A comment before a block of commands says how it is tested:

    <!-- run: tests/test_x.py -->    that test runs the block's commands
    <!-- not run: why -->            no test runs them, and commands unknown to `fault` are allowed
    no comment                       no test runs them, but `fault` checks every one
"""

import ast
import re
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple

import yaml
from dvc.cli import DvcParserError
from dvc.cli.parser import get_main_parser
from dvc.exceptions import DvcException
from dvc.utils.hydra import apply_overrides, get_hydra_sweeps
from tiny import PARAMS, ROOT

from stages.shared.params import faults

BLOCK = re.compile(r"(?:<!-- ((?:not )?run): (.+) -->\n)?```(console|bash)\n(.*?)```", re.DOTALL)
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
# Too plain to be checked.
SHELL = {".", "cp", "rm", "git"}
PYTHON = ["python", "-m"]


class Block(NamedTuple):
    """`mark`: "run", "not run" or empty; `why`: the rest of the comment."""

    mark: str
    why: str
    commands: list[str]


def blocks(page: str) -> list[Block]:
    """Every block of commands of a page; continued lines are joined."""
    found = []
    for mark, why, kind, body in BLOCK.findall((ROOT / page).read_text(encoding="utf-8")):
        lines = body.replace("\\\n", " ").splitlines()
        if kind == "console":
            prompts = (re.match(r"\w*\$ (.*)", line) for line in lines)
            lines = [prompt[1] for prompt in prompts if prompt]
        found.append(Block(mark, why, lines))
    return found


def simple(line: str) -> list[list[str]]:
    """The words of each command of a line, without variables that are set for it."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("&|;()"):
            found.append([])
        elif found[-1] or not re.match(r"[A-Z_]+=", word):
            found[-1].append(word)
    return [words for words in found if words]


def fault(words: list[str], folder: Path) -> str | None:
    """What is wrong with a command, "unknown" for one that nothing here can judge, or None.

    folder  an empty one, to try parameters in
    """
    if words[0] == "dvc":
        return _of_dvc(words[1:], folder)
    if words[0] == "make":
        done = subprocess.run(
            ["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stderr.strip() or None
    if words[0] == "pytest" or words[:3] == [*PYTHON, "pytest"]:
        files = [word for word in words if word.endswith(".py")]
        return next((f"no {file}" for file in files if not (ROOT / file).exists()), None)
    if words[:2] == PYTHON:
        return _of_module(words[2], words[3:])
    return None if words[0] in SHELL else "unknown"


def _of_dvc(words: list[str], folder: Path) -> str | None:
    """By DVC's own parser, its own change of params.yaml, and the schema of params.yaml."""
    try:
        given = get_main_parser().parse_args(words)
    except DvcParserError as error:
        return str(error)
    if words[0] in ("repro", "commit") or words[:2] == ["exp", "run"]:
        strangers = [name for name in given.targets if name not in STAGES]
        if strangers:
            return f"no stage {strangers[0]}"
    for changes in get_hydra_sweeps({"params.yaml": getattr(given, "set_param", None) or []}):
        file = folder / "params.yaml"
        file.write_bytes(PARAMS.read_bytes())
        try:
            apply_overrides(file, changes["params.yaml"])
        except DvcException as error:
            return str(error.__cause__)
        if found := faults(file.read_text()):
            return "; ".join(found)
    return None


def _of_module(module: str, words: list[str]) -> str | None:
    """Whether the module exists and its source has each option."""
    file = ROOT / f"{module.replace('.', '/')}.py"
    if not file.exists():
        return f"no module {module}"
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    known = {node.value for node in nodes if isinstance(node, ast.Constant)} | {"--help"}
    return next(
        (f"{module} has no {word}" for word in words if word[0] == "-" and word not in known), None
    )
