"""Releases loaded in transformers 4.57 and 5, in environments that hold nothing else; served by
`transformers serve`, and converted to GGUF by llama.cpp's own script.

    make test-serving

What the project's own environment computes with a release, those must compute too.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from test_companions import LLAMA3, OLD
from transformers import AutoModelForCausalLM, AutoTokenizer

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


def ask(url: str, **body) -> dict:
    data = json.dumps(body).encode() if body else None
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as answer:
        return json.load(answer)


@pytest.fixture
def served(releases):
    """The address of `transformers serve` with the first tiny release."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [ROOT / ".serving/5/bin/transformers", "serve", releases[FORMS[0]]]
    command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert server.poll() is None, "the server has ended"
            try:
                ask(f"{url}/health")
                break
            except urllib.error.URLError:
                time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait()


def test_transformers_serve_answers_as_the_release_does(served, releases):
    messages = [{"role": "user", "content": "Show item 3 of box 3"}]
    answer = ask(f"{served}/v1/chat/completions", messages=messages, max_tokens=12, temperature=0)
    folder = releases[FORMS[0]]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    length = prompt["input_ids"].shape[1]
    assert answer["usage"]["prompt_tokens"] == length
    expected = tokenizer.decode(made[0, length:], skip_special_tokens=True)
    assert answer["choices"][0]["message"]["content"] == expected


@pytest.mark.skipif(not DEFAULT.exists(), reason="no models/release here: make repro")
def test_the_default_as_gguf_is_the_release(tmp_path):
    """The converter knows tokenizers that exist, so no tiny one."""
    file = tmp_path / "release.gguf"
    script = [ROOT / ".gguf/convert_hf_to_gguf.py", DEFAULT, "--outtype", "auto", "--outfile", file]
    subprocess.run([sys.executable, *script], check=True)
    check = [sys.executable, "-m", "tools.check_gguf", file]
    told = subprocess.run(check, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "equal the release's" in told
