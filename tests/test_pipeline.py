"""dvc.yaml declares what the code of each stage imports and reads, and its parameters."""

import ast
from pathlib import PurePosixPath

import pytest
import yaml
from source_code import code, imports, tree
from tiny import ROOT

from stages.shared import paths as shared_paths
from stages.shared.params import Params

PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
STAGES = PIPELINE["stages"]
SCRIPTS = sorted(file.stem for file in (ROOT / "stages").glob("*.py") if file.stem != "__init__")
SECTIONS = set(Params.model_fields)
# The schema accepts or refuses and never changes a result (tests/test_params.py).
SCHEMA = "stages/shared/params.py"
ERRORS = "stages/shared/params_errors.py"
# dvc.yaml repeats its paths, and the tests below compare the two.
PATHS = "stages/shared/paths.py"
# No stage depends on them: a new parameter, or a new path of another stage, makes nothing stale.
UNDECLARED = {SCHEMA, ERRORS, PATHS}
# For communication between stages and dvc during a run; no result depends on them.
OWN_FILES = {"stages/shared/process.py", "stages/shared/interrupts.py"}
SHARED_PATHS = {name: path for name, path in vars(shared_paths).items() if name.isupper()}
# It shows training while it runs: no result depends on it, and changing it reruns nothing.
NO_RESULT = {"tracking"}
# The only key that has more effects than its section: another rank does not rerun prepare.
LEAF = ("lora", "new_tokens")
# Only named in the message that a package is not installed.
PINS = [PurePosixPath("requirements-default.lock")]


def paths(entries: list) -> list[str]:
    """The paths in a list of dvc.yaml, whose entries may have options."""
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def outs(stage: dict) -> list[str]:
    return [p for kind in ("outs", "metrics", "plots") for p in paths(stage.get(kind, []))]


def assets(files: set[str]) -> set[str]:
    """Files that the code names besides Python files, such as a style sheet."""
    beside = {
        file.name: file.relative_to(ROOT).as_posix()
        for file in (ROOT / "stages").rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc")
    }
    return {
        beside[node.value]
        for file in files
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Constant) and node.value in beside
    }


def sections(files: set[str]) -> set[str]:
    """Sections of params.yaml that this code reads: attributes of the result of load_params."""
    found = set()
    for file in files - {SCHEMA, "stages/shared/process.py"}:
        for function in ast.walk(tree(file)):
            if isinstance(function, ast.FunctionDef):
                found |= sections_of(function)
    return found


def sections_of(function: ast.FunctionDef) -> set[str]:
    nodes = list(ast.walk(function))
    names = {
        target.id
        for node in nodes
        if isinstance(node, ast.Assign) and is_call(node.value, "load_params")
        for target in node.targets
    } | {
        arg.arg
        for arg in function.args.args
        if getattr(arg.annotation, "id", "Params" if arg.arg == "params" else "") == "Params"
    }
    found = set()
    leaves = [n.value for n in nodes if isinstance(n, ast.Attribute) and n.attr == LEAF[1]]
    for node in nodes:
        if isinstance(node, ast.Attribute) and is_whole(node.value, names):
            assert node.attr in SECTIONS | {"model_dump", "model_copy"}, node.attr
            leaf = node.attr == LEAF[0] and node in leaves
            found |= {".".join(LEAF)} if leaf else {node.attr} & SECTIONS
        dumps = isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "model_dump"
        if dumps and is_whole(node.func.value, names):
            named = {k.arg: ast.literal_eval(k.value) for k in node.keywords}
            found |= named.get("include", SECTIONS) - named.get("exclude", set())
    return found


def named_paths(file: str) -> list[PurePosixPath]:
    """The paths that `file` names: constants, and what it imports from stages/shared/paths.py."""
    found, shared = [], []
    for node in ast.walk(tree(file)):
        if is_call(node, "Path") and isinstance(node.args[0], ast.Constant):
            found.append(PurePosixPath(node.args[0].value))
        if isinstance(node, ast.ImportFrom) and node.module == "stages.shared.paths":
            shared += [PurePosixPath(SHARED_PATHS[alias.name]) for alias in node.names]
    assert bool(shared) == (PATHS in imports(file)), f"{file}: import names from {PATHS}"
    return found + shared


def is_call(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == name


def is_whole(node: ast.AST, names: set[str]) -> bool:
    """Whether an expression is the whole params object."""
    return is_call(node, "load_params") or (isinstance(node, ast.Name) and node.id in names)


def test_every_script_is_a_stage():
    assert sorted(STAGES) == SCRIPTS


@pytest.mark.parametrize("name", SCRIPTS)
def test_command_replaces_the_shell(name):
    """Without exec, a shell stands between dvc and the stage, and killing dvc leaves an orphan."""
    assert STAGES[name]["cmd"] == f"exec python -m stages.{name}"
    assert STAGES[name]["desc"].endswith(".")


@pytest.mark.parametrize("name", SCRIPTS)
def test_code_is_declared_exactly(name):
    declared = {dep for dep in STAGES[name]["deps"] if dep.startswith("stages/")}
    files = code(name)
    assert declared == (files | assets(files)) - UNDECLARED


@pytest.mark.parametrize("name", SCRIPTS)
def test_params_are_declared_exactly_as_whole_sections(name):
    """With single keys, `-S lora.dropout=0.2` might run nothing."""
    assert set(STAGES[name].get("params", [])) == sections(code(name)) - NO_RESULT


def test_nothing_but_train_reads_the_tracker():
    """Otherwise an output of another stage could contain it without dvc.lock knowing."""
    assert [name for name in SCRIPTS if sections(code(name)) & NO_RESULT] == ["train"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_path_constants_are_declared(name):
    """A stage is not rerun if something that it reads without declaring it changes."""
    stage = STAGES[name]
    declared = [PurePosixPath(p) for p in [*stage["deps"], *outs(stage)]]
    # Every stage reads params.yaml and dvc.yaml; DVC compares their sections and stages.
    for file in code(name) - UNDECLARED - OWN_FILES:
        for path in named_paths(file):
            # The code adds a name to a folder that has outs of several stages.
            known = path.as_posix() in ("metrics", "data", "models") or path in PINS
            # What plan predicted is quoted where memory runs out, and its limit decides where
            # weights and activations lie; no output depends on either.
            placed = name in ("train", "evaluate", "verify")
            known |= placed and path.as_posix() == "metrics/plan.json"
            # Tells an adapter of an older version: taken or refused, with the same outputs.
            taken = name in ("evaluate", "merge")
            known |= taken and path.as_posix() == "metrics/train_cost.json"
            # Facts about the machine are recorded and decide nothing.
            known |= any(path.is_relative_to(system) for system in ("/proc", "/sys"))
            assert known or any(path == d or d in path.parents for d in declared), path


def test_shared_paths_cannot_be_mistaken_for_each_other():
    """No stage depends on their module, so a name must not change its path."""
    for name, path in SHARED_PATHS.items():
        assert path.name == name.lower()


@pytest.mark.parametrize("name", SCRIPTS)
def test_lists_are_sorted(name):
    """One order, so that a change is one line and merge conflicts are rare."""
    stage = STAGES[name]
    for key in ("deps", "params", "outs", "metrics"):
        assert paths(stage.get(key, [])) == sorted(paths(stage.get(key, []))), key


@pytest.mark.parametrize("name", SCRIPTS)
def test_outs_lie_in_their_folders(name):
    for out in outs(STAGES[name]):
        assert out.split("/")[0] in ("data", "models", "metrics")
        assert len(PurePosixPath(out).parts) == 2


def test_no_dependency_lies_inside_an_out():
    """`dvc repro --pull --allow-missing` would pull part of a folder and run on it."""
    made = {PurePosixPath(out) for stage in STAGES.values() for out in outs(stage)}
    for name, stage in STAGES.items():
        for dep in map(PurePosixPath, stage["deps"]):
            assert not made & set(dep.parents), f"{name}: {dep}"


def test_outs_are_unlike():
    made = [out for stage in STAGES.values() for out in outs(stage)]
    assert len(made) == len(set(made))


def test_everything_but_metrics_and_plots_is_cached():
    """An out with `cache: false` or `persist: true` switches the stage's run cache off."""
    unpushed = set()
    for stage in STAGES.values():
        for entry in stage.get("outs", []):
            for path, options in {} if isinstance(entry, str) else entry.items():
                assert options == {"push": False}, path
                unpushed.add(path)
        for kind in ("metrics", "plots"):
            for entry in stage.get(kind, []):
                assert next(iter(entry.values()))["cache"] is False
    # Everything else CI can recreate only by pulling it (dvc repro --pull --allow-missing).
    assert unpushed == {"models/merged", "models/release"}


def test_plan_comes_before_quantize():
    """DVC follows the order of dvc.yaml: a run that will not fit must not quantize first."""
    order = list(STAGES)
    assert order.index("plan") < order.index("quantize") < order.index("train")


def test_nothing_runs_on_a_dependency_that_nobody_makes():
    made = {out for stage in STAGES.values() for out in outs(stage)}
    for stage in STAGES.values():
        for dep in stage["deps"]:
            kept = (ROOT / dep).exists() and not dep.startswith(("models/", "metrics/"))
            assert dep in made or kept, dep


def test_artifact_is_an_out():
    made = {out for stage in STAGES.values() for out in outs(stage)}
    assert {entry["path"] for entry in PIPELINE["artifacts"].values()} <= made
