"""Stages import no more than they use; deferred imports happen when they are needed."""

import gc
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from tiny import PARAMS, ROOT, TINY_PARAMS

from stages.shared.libraries import compiling_later, load_libraries

pytestmark = pytest.mark.slow

STAGES = ROOT / "stages"
# Runs stages' scripts up to main(), one after another, and lists what has been imported after each.
START = """
import json, sys
from pathlib import Path
from stages.shared import process
process.begin = lambda name: None
for name in sys.argv[1:]:
    script = Path(process.__file__).parents[1].joinpath(f"{name}.py").read_text(encoding="utf-8")
    script = script[:script.rindex("if __name__ ==")]
    exec(compile(script, name, "exec"), {"__name__": "__main__"})
    if name == "merge":
        import torch
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
        dequantize_4bit(*quantize_4bit(torch.ones(64, 64), compress_statistics=True))
    print(json.dumps([name, sorted(key for key, module in sys.modules.items() if module)]))
"""
HEAVY = ["fetch_model", "plan", "quantize", "evaluate", "verify", "train"]
NEEDLESS = {"torch._inductor.compile_fx", "scipy.optimize"}
# In these, transformers finds no torch: they load a tokenizer but no model.
MODELLESS = {"merge": "models/merged", "prepare": "data/prepared"}


def imported(folder, names: list[str]) -> dict[str, set[str]]:
    """The modules that are there when each of `names` has been started after those before it."""
    params = yaml.safe_load(PARAMS.read_text(encoding="utf-8")) | {"model": TINY_PARAMS["model"]}
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", START, *names],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return {name: set(modules) for name, modules in lines}


def test_stages_without_tensors_import_no_torch(tmp_path):
    names = ["fetch_data", "fetch_retention", "export", "prepare"]
    found = imported(tmp_path, names)
    assert "transformers" in found["prepare"]
    assert [name for name in names if "torch" in found[name]] == []


def test_merge_imports_no_compiler_and_no_models(tmp_path):
    found = imported(tmp_path, ["merge"])["merge"]
    assert {"bitsandbytes", "transformers"} <= found
    assert found.isdisjoint({"torch._dynamo", "transformers.modeling_utils"})


def test_stages_with_models_import_no_compiler(tmp_path):
    found = imported(tmp_path, HEAVY)
    assert "bitsandbytes" in found["train"]
    assert [name for name in HEAVY if NEEDLESS & found[name]] == []


def test_every_stage_is_looked_at():
    scripts = {file.stem: file.read_text(encoding="utf-8") for file in STAGES.glob("[a-z]*.py")}
    assert set(scripts) == {*HEAVY, "merge", "fetch_data", "fetch_retention", "export", "prepare"}
    hiding = {name for name, script in scripts.items() if '["torch"]' in script}
    assert hiding == set(MODELLESS)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "out"), MODELLESS.items())
def test_without_torch_transformers_does_the_same(name, out, finished, tmp_path):
    """The finished workspace comes of processes in which transformers has found torch."""
    folder = shutil.copytree(finished, tmp_path / "ws")
    shutil.rmtree(folder / out)
    command = [sys.executable, "-m", f"stages.{name}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for file in (finished / out).rglob("*"):
        if file.is_file():
            same = folder / file.relative_to(finished)
            assert same.read_bytes() == file.read_bytes(), same


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    """Two libraries: `looks` takes `optional` where it can."""
    (tmp_path / "optional_one.py").write_text("")
    (tmp_path / "looks.py").write_text(
        "import gc, importlib.util\n"
        "found = importlib.util.find_spec('optional_one') is not None\n"
        "collecting = gc.isenabled()\n"
    )
    (tmp_path / "demands.py").write_text("import optional_one\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("looks", "demands", "optional_one"):
        sys.modules.pop(name, None)
    gc.unfreeze()


def test_hidden_modules_are_there_again_afterwards(libraries):
    load_libraries("looks", without=["optional_one"])
    assert not sys.modules["looks"].found
    assert not sys.modules["looks"].collecting
    assert gc.isenabled()
    load_libraries("demands", without=[])
    assert "optional_one" in sys.modules


def test_nothing_stays_hidden_when_a_library_fails(libraries):
    with pytest.raises(ModuleNotFoundError, match="optional_one"):
        load_libraries("demands", without=["optional_one"])
    assert "optional_one" not in sys.modules
    assert gc.isenabled()


def test_what_is_loaded_is_not_hidden(libraries):
    load_libraries("optional_one", without=[])
    load_libraries("demands", without=["optional_one"])
    assert "optional_one" in sys.modules


@pytest.fixture
def compiled(monkeypatch):
    """A torch.compile that notes what it is given and whose functions return one more."""
    asked = []

    def fake_compile(model, **options):
        asked.append((getattr(model, "__name__", model), options))
        return lambda *args, **kwargs: model(*args, **kwargs) + 1

    monkeypatch.setattr(torch, "compile", fake_compile)
    return asked


def test_a_function_is_compiled_once_when_it_is_called(compiled):
    with compiling_later():

        @torch.compile
        def double(x):
            return 2 * x

        @torch.compile(dynamic=False)
        def triple(x):
            return 3 * x

    assert compiled == []
    assert [double(1), double(x=2), triple(1)] == [3, 5, 4]
    assert compiled == [("double", {}), ("triple", {"dynamic": False})]
    assert double.__name__ == "double"


def test_a_module_is_compiled_at_once(compiled):
    module = torch.nn.Linear(1, 1)
    with compiling_later():
        torch.compile(module)
    assert compiled == [(module, {})]


def test_kernels_are_kept_from_the_compiler_once_there_is_one(monkeypatch):
    monkeypatch.setattr(torch, "_disable_dynamo", lambda function: lambda: "kept out")
    with compiling_later():
        kernel = torch._disable_dynamo(lambda: "plain")
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    assert kernel() == "plain"
    monkeypatch.setitem(sys.modules, "torch._dynamo", torch)
    assert kernel() == "kept out"
