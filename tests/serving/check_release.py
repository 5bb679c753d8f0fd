"""Releases loaded in transformers 4.57 and 5, in environments that hold nothing else.

    make test-serving

What the project's own environment computes with a release, those must compute too.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_companions import LLAMA3, OLD

from stages import merge
from stages.shared.outputs import write_sums
from tests.merging import make_sources, run
from tests.tiny import ROOT, make_tokenizer

ENVIRONMENTS = sorted((ROOT / ".serving").glob("*/ready"))
DEFAULT = ROOT / "models/release"
ROPE = {"rope_type": "default", "rope_theta": 1e5}
NESTED = {"full_attention": ROPE | {"rope_theta": 1e6}, "sliding_attention": ROPE}
LAYERS = ["sliding_attention", "full_attention"]
BASES = {
    "llama": {"rope_parameters": ROPE},
    "llama3": {"arch": "llama", "rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    "mistral": {"rope_parameters": ROPE, "sliding_window": 8},
    "qwen2": {"rope_parameters": ROPE},
    "qwen3": {"rope_parameters": ROPE},
    "phi": {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
    "gemma": {"rope_parameters": ROPE},
    "gemma3_text": {"rope_parameters": NESTED, "layer_types": LAYERS, "sliding_window": 8},
}


FORMS = [f"{name} saved by {form}" for name in BASES for form in (4, 5)]


def merged(root: Path, name: str, form: str) -> Path:
    """A tiny merged model whose base's tokenizer is as transformers `form` saved it."""
    base, quantized = root / "models/base", root / "models/quantized"
    make_sources(root, **({"arch": name} | BASES[name]), nf4=False)
    tokenizer = make_tokenizer(base)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(base)
    if form == "4":
        (base / "tokenizer_config.json").write_text(json.dumps(OLD))
    write_sums(base)
    shutil.rmtree(quantized)
    shutil.copytree(base, quantized)
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(merge, root, monkeypatch)
    return root / "models/merged"


@pytest.fixture(scope="module")
def releases(tmp_path_factory) -> dict[str, Path]:
    made = {"the default": DEFAULT} if DEFAULT.exists() else {}
    for form in FORMS:
        made[form] = merged(tmp_path_factory.mktemp("root"), *form.split(" saved by "))
    return made


@pytest.fixture(scope="module")
def loaded(releases) -> dict[str, dict]:
    """What each environment says of all releases, by its name."""
    pythons = {"here": sys.executable}
    pythons |= {ready.parent.name: ready.parent / "bin/python" for ready in ENVIRONMENTS}
    found = {}
    for name, python in pythons.items():
        command = [python, ROOT / "tests/serving/load.py", *releases.values()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("environment", ["4.57", "5"])
@pytest.mark.parametrize("form", ["the default", *FORMS])
def test_it_computes_the_same_as_here(form, environment, releases, loaded):
    if form not in releases:
        pytest.skip("no models/release here: make repro")
    assert loaded[environment]["transformers"].startswith(environment)
    here, there = (loaded[name][str(releases[form])] for name in ("here", environment))
    for one, other in zip(there.pop("logits"), here["logits"], strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    assert there == {key: here[key] for key in there}
