"""The files beside the merged weights: the base's own, with the final settings."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from stages.merging import companions
from tests.tiny import CHATML, make_tokenizer

TOOLS = "{{ tools }}"
TOKEN = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
TOKEN |= {"special": True}
# As saved by transformers 4, like most bases.
OLD = {
    "added_tokens_decoder": {
        str(i): TOKEN | {"content": text}
        for i, text in enumerate(["<unk>", "<|im_start|>", "<|im_end|>", "<pad>"])
    },
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    "bos_token": "<|im_start|>",
    "clean_up_tokenization_spaces": False,
    "eos_token": TOKEN | {"__type": "AddedToken", "content": "<pad>"},
    "model_max_length": 512,
    "pad_token": None,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": "<unk>",
}
FILES = {
    "tokenizer.model": "pieces",
    "added_tokens.json": "{}",
    "preprocessor_config.json": "{}",
    "USE_POLICY.md": "be good",
    "special_tokens_map.json": json.dumps({"eos_token": "<pad>", "unk_token": "<unk>"}),
}


@pytest.fixture
def base(tmp_path) -> Path:
    """Like many bases of the Hub, whose answers do not end with the EOS."""
    folder = tmp_path / "base"
    make_tokenizer(folder, chat_template=None)
    (folder / "tokenizer_config.json").write_text(json.dumps(OLD))
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 260}))
    return folder


def written(base: Path, settled: Path, out: Path) -> dict:
    """The companions of `base` with a tokenizer in `out`; tokenizer_config.json."""
    out.mkdir()
    companions.write_companions(out, base, settled, companions.torch.float16)
    assert companions.behaviour(out) == companions.behaviour(settled)
    return json.loads((out / "tokenizer_config.json").read_text())


def settle(base: Path, folder: Path, template: str = CHATML, **tokens: str) -> Path:
    """What prepare writes from the base's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<pad>"
    for key, token in tokens.items():
        setattr(tokenizer, key, token)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def test_the_bases_own_files_with_what_was_settled(base, tmp_path):
    out = tmp_path / "out"
    config = written(base, settle(base, tmp_path / "settled"), out)
    assert config == OLD | {"eos_token": "<|im_end|>", "pad_token": "<pad>"}
    for name in ("tokenizer.model", "added_tokens.json", "preprocessor_config.json"):
        assert (out / name).read_text() == FILES[name]
    assert (out / "USE_POLICY.md").exists()
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    special = json.loads((out / "special_tokens_map.json").read_text())
    assert special == {"eos_token": "<|im_end|>", "pad_token": "<pad>", "unk_token": "<unk>"}
    assert (out / "chat_template.jinja").read_text() == CHATML
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2]


def test_what_was_not_changed_keeps_its_bytes(base, tmp_path):
    settled = settle(base, tmp_path / "settled", eos_token="<pad>", pad_token=None)
    written(base, settled, tmp_path / "out")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_paths_of_the_machine_stay_on_it(base, tmp_path):
    """The release may be published."""
    origins = ("name_or_path", "special_tokens_map_file", "tokenizer_file")
    paths = dict.fromkeys(origins, "/home/me/tiny")
    (base / "tokenizer_config.json").write_text(json.dumps(OLD | paths))
    own = {"_name_or_path": "/home/me/tiny"}
    for name in ("config.json", "generation_config.json"):
        content = json.loads((base / name).read_text()) if (base / name).exists() else {}
        (base / name).write_text(json.dumps(content | own))
    out = tmp_path / "out"
    config = written(base, settle(base, tmp_path / "settled"), out)
    assert config == OLD | {"eos_token": "<|im_end|>", "pad_token": "<pad>"}
    assert [f.name for f in out.rglob("*") if f.is_file() and b"/home/me" in f.read_bytes()] == []


@pytest.mark.parametrize("inline", [True, False])
def test_templates_under_other_names_stay(base, tmp_path, inline):
    if inline:
        named = [{"name": "tool_use", "template": TOOLS}, {"name": "default", "template": "old"}]
        (base / "tokenizer_config.json").write_text(json.dumps(OLD | {"chat_template": named}))
    else:
        (base / "chat_template.jinja").write_text("old")
        (base / "additional_chat_templates").mkdir()
        (base / "additional_chat_templates/tool_use.jinja").write_text(TOOLS)
    out = tmp_path / "out"
    written(base, settle(base, tmp_path / "settled"), out)
    found = AutoTokenizer.from_pretrained(out).chat_template
    assert found == {"default": CHATML, "tool_use": TOOLS}
    assert (out / "chat_template.jinja").exists() != inline


def test_an_inline_template_and_a_processors_own_follow(base, tmp_path):
    (base / "tokenizer_config.json").write_text(json.dumps(OLD | {"chat_template": "old"}))
    (base / "chat_template.json").write_text(json.dumps({"chat_template": "old"}))
    config = written(base, settle(base, tmp_path / "settled"), tmp_path / "out")
    assert config["chat_template"] == CHATML
    processor = json.loads((tmp_path / "out/chat_template.json").read_text())
    assert processor == {"chat_template": CHATML}


def test_what_transformers_5_saved_is_written_for_4(tmp_path):
    base = tmp_path / "base"
    tokenizer = make_tokenizer(base)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(base)
    before = json.loads((base / "tokenizer_config.json").read_text())
    assert before["tokenizer_class"] == "TokenizersBackend"
    assert before["extra_special_tokens"] == ["<|im_start|>"]
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 260}))
    config = written(base, base, tmp_path / "out")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|im_start|>"]
    assert not config.keys() & {"backend", "extra_special_tokens", "is_local"}


def test_another_tokenizer_is_taken_as_it_is(base, tmp_path):
    """As of a foreign adapter, which verify judges."""
    other = settle(base, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(content))
    written(base, other, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("AB") == AutoTokenizer.from_pretrained(
        base
    )("ab")


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 256}
ROPES = [
    ("llama", {"rope_theta": 1e5, "rope_type": "default"}, {"rope_theta": 1e5}),
    ("llama", LLAMA3 | {"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    (
        "phi",
        {"rope_theta": 2e4, "rope_type": "default", "partial_rotary_factor": 0.25},
        {"rope_theta": 2e4, "partial_rotary_factor": 0.25},
    ),
    (
        "gemma3_text",
        {
            "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        },
        {
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
]


@pytest.mark.parametrize(("kind", "rope", "old"), ROPES, ids=[row[0] for row in ROPES])
def test_config_says_rotary_embeddings_in_both_forms(kind, rope, old, tmp_path):
    file = tmp_path / "config.json"
    CONFIG_MAPPING[kind](rope_parameters=rope).save_pretrained(tmp_path)
    new, config = AutoConfig.from_pretrained(tmp_path).to_dict(), json.loads(file.read_text())
    made = companions.served_config(config)
    assert {key: made[key] for key in made.keys() - config.keys()} == old
    assert config.items() <= made.items()
    file.write_text(json.dumps(made))
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == new
