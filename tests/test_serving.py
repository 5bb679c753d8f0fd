"""Formats for other servers: a GGUF file read back, and a Modelfile for Ollama.

llama.cpp's converter itself runs in tests/serving/check_release.py.
"""

import json
import re
import shutil
import sys

import gguf
import jinja2
import numpy as np
import pytest
import torch
from known_templates import make_tokenizer as make_marked
from known_templates import template
from safetensors.torch import load_file, save_file
from tiny import make_model, make_tokenizer

from tools import check_gguf, modelfile

HEADS, KV_HEADS = 4, 2


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    make_model(folder)
    make_tokenizer(folder)
    return folder


def turned(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of q or k in llama.cpp's order: halves of a head become neighbours."""
    halves = [np.split(head, 2) for head in np.split(weight, heads)]
    return np.concatenate([np.stack(pair, 1).reshape(-1, weight.shape[1]) for pair in halves])


def write_gguf(file, release, **changes):
    """What llama.cpp's converter writes of a Llama; `changes` are its faults."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    document = json.loads((release / "tokenizer.json").read_text())
    tokens = sorted(document["model"]["vocab"], key=document["model"]["vocab"].get)
    writer.add_token_list(changes.get("tokens", tokens))
    writer.add_eos_token_id(changes.get("end", 2))
    template = (release / "chat_template.jinja").read_text()
    writer.add_chat_template(template + changes.get("template", ""))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    values: dict[str, list[np.ndarray]] = {}
    for name, tensor in sorted(load_file(release / "model.safetensors").items()):
        place = names.get_name(re.sub(r"experts\.\d+", "experts", name), (".weight",))
        values.setdefault(place, []).append(tensor.float().numpy())
    for place, found in values.items():
        value = np.stack(found) if "_exps" in place else found[0]
        for part, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
            value = turned(value, heads) if part in place else value
        value = changes.get(place, lambda value: value)(value)
        if value is not None:
            kind = gguf.GGMLQuantizationType.BF16 if value.ndim > 1 else None
            data = value if kind is None else gguf.quantize(value, kind)
            writer.add_tensor(place, data, raw_dtype=kind)
    if extra := changes.get("extra"):
        writer.add_tensor(extra, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def checked(file, release, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["check_gguf", str(file), "--release", str(release)])
    try:
        check_gguf.main()
        status = 0
    except SystemExit as ended:
        status = ended.code
    return status, capsys.readouterr().out


def test_what_the_converter_leaves_out_is_not_missed(release, tmp_path, capsys, monkeypatch):
    write_gguf(tmp_path / "it.gguf", release)
    old = shutil.copytree(release, tmp_path / "old")
    weights = load_file(old / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, old / "model.safetensors", metadata={"format": "pt"})
    status, said = checked(tmp_path / "it.gguf", old, capsys, monkeypatch)
    assert status == 0, said


def test_a_file_that_holds_the_release_passes(release, tmp_path, capsys, monkeypatch):
    write_gguf(tmp_path / "it.gguf", release, extra="rope_freqs.weight")
    status, said = checked(tmp_path / "it.gguf", release, capsys, monkeypatch)
    assert (status, "260 tokens equal the release's" in said) == (0, True), said


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("broken", [False, True])
def test_experts_lie_behind_each_other(broken, release, tmp_path, capsys, monkeypatch):
    mixture = tmp_path / "mixture"
    make_model(mixture, "mixtral", num_local_experts=2)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(release / name, mixture / name)
    if broken:
        weights = load_file(mixture / "model.safetensors")
        weights["model.layers.1.block_sparse_moe.experts.1.w2.weight"][3, 5] += 1
    write_gguf(tmp_path / "it.gguf", mixture)
    if broken:
        save_file(weights, mixture / "model.safetensors")
    status, said = checked(tmp_path / "it.gguf", mixture, capsys, monkeypatch)
    assert status == int(broken), said
    assert ("blk.1.ffn_down_exps.weight (BF16) differs from model" in said) is broken


FAULTS = {
    "one value": (
        {"blk.0.ffn_up.weight": lambda v: v * (v != v.max())},
        "(BF16) differs from model.lay",
    ),
    "one norm": (
        {"output_norm.weight": lambda v: v * 1.01},
        "(F32) differs from model.norm.weight",
    ),
    "rows in Transformers' order": (
        {"blk.1.attn_q.weight": lambda v: v[::-1]},
        f"differs from {Q}",
    ),
    "a tensor is missing": ({"blk.1.attn_q.weight": lambda v: None}, f"{Q} is missing"),
    "a tensor too many": ({"extra": "output.weight"}, "output.weight is not in the release"),
    "tokens in another order": (
        {"tokens": [f"t{number}" for number in range(260)]},
        "is 't0', not '<unk>'",
    ),
    "tokens missing": ({"tokens": ["<unk>"]}, "is None, not "),
    "another end": ({"end": 3}, "the end token is 3, but 2 in the release"),
    "another template": ({"template": " "}, "the chat template differs"),
}


@pytest.mark.parametrize(("changes", "message"), FAULTS.values(), ids=FAULTS)
def test_a_file_that_differs_does_not(changes, message, release, tmp_path, capsys, monkeypatch):
    write_gguf(tmp_path / "it.gguf", release, **changes)
    status, said = checked(tmp_path / "it.gguf", release, capsys, monkeypatch)
    assert (status, message in said) == (1, True), said


@pytest.mark.parametrize("part", [None, 0.0, 0.01, 0.9])
def test_no_whole_file_is_one_line(part, release, tmp_path, monkeypatch, capsys):
    file = tmp_path / "it.gguf"
    if part is not None:
        write_gguf(file, release)
        file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])
    monkeypatch.setattr(sys, "argv", ["check_gguf", str(file), "--release", str(release)])
    with pytest.raises(SystemExit) as ended:
        check_gguf.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"check_gguf: .+ cannot be compared with .+; make gguf rewrites it\n", said)


def go(text: str, messages: list[dict], system: str | None) -> str:
    """What Ollama makes of a Modelfile's TEMPLATE: its few Go actions, read as Jinja's."""
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    text = re.sub(r'if eq \.Role "(\w+)" }}', r'if m.role == "\1" %}', text)
    text = text.replace("{{ range .Messages }}", "{% for m in messages %}")
    text = text.replace("{{ .Content }}", "{{ m.content }}").replace("{{ else if ", "{% elif ")
    text = text.replace("else if", "elif").replace("{{ if", "{% if")
    head, inner, tail = text.rpartition("{{ end }}{{ end }}")
    assert inner
    text = f"{head}{{% endif %}}{{% endfor %}}{tail}"
    return (
        jinja2.Environment(keep_trailing_newline=True).from_string(text).render(messages=messages)
    )


SAID = [
    {"role": "user", "content": "What now?"},
    {"role": "assistant", "content": "This."},
    {"role": "user", "content": "And then?"},
]


@pytest.mark.parametrize(
    ("name", "system"),
    [("qwen2_5", True), ("llama3", True), ("gemma", False), ("deepseekv3", True)],
)
def test_a_modelfile_says_what_the_template_says(name, system, tmp_path):
    tokenizer = make_marked(template(name))
    tokenizer.chat_template = template(name)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    written = modelfile.modelfile(tmp_path)
    [text] = re.findall('TEMPLATE """(.*?)"""', written, re.DOTALL)
    default = re.search('SYSTEM """(.*?)"""', written, re.DOTALL)
    for messages in [
        SAID,
        SAID[:1],
        *([[{"role": "system", "content": "Be kind."}, *SAID]] * system),
    ]:
        expected = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        assert go(text, messages, default and default[1]) == expected
    stops = [json.loads(stop) for stop in re.findall("PARAMETER stop (.*)", written)]
    assert stops == tokenizer.convert_ids_to_tokens([1, 2])
    assert ("no system message" in written) is not system


@pytest.mark.parametrize("name", ["phi3", "qwen3", "gptoss"])
def test_a_template_that_go_cannot_say_is_refused(name, tmp_path, monkeypatch, capsys):
    tokenizer = make_marked(template(name))
    tokenizer.chat_template = template(name)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["modelfile", "--release", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        modelfile.main()
    told = capsys.readouterr()
    assert (ended.value.code, told.out) == (1, "")
    assert re.fullmatch(
        "modelfile: the chat template cannot be converted: .+; write .+\n", told.err
    )
