"""lora.new_tokens: a base model without chat tokens, given a template that writes some."""

import json

import pytest
import torch
from merging import tensors
from peft import PeftModel
from quick import Stage, run
from safetensors.torch import load_file
from tiny import make_model, make_workspace
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from stages.shared.embeddings import extend

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content']"
    " + '<|stop|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TOKENS = ["<|user|>", "<|assistant|>", "<|stop|>", "<pad>"]
# Of the tokenizer's 260, <pad> is one; the model of the second has spare rows.
IDS = [260, 261, 262, 3]
KINDS = {
    "tied, extended": (
        {"tie_word_embeddings": True},
        {"quantize": {"type": "nf4"}, "merge": {"base": "dequantized", "dtype": "float16"}},
    ),
    "untied, spare rows": (
        {"tie_word_embeddings": False, "vocab_size": 272},
        {"quantize": {"type": "none"}, "merge": {"base": "original", "dtype": "bfloat16"}},
    ),
}
STAGES = ("plan", "quantize", "train", "evaluate", "merge", "verify", "export")


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    model, settings = KINDS[request.param]
    folder = make_workspace(
        tmp_path_factory.mktemp("new") / "project",
        prepare={"template": "templates/own.jinja", "train_rows": 24, "eval_rows": 8},
        lora={"new_tokens": TOKENS},
        train={"learning_rate": 1e-2, "batch_size": 2},
        **settings,
    )
    make_model(folder / "tiny", **model)
    (folder / "templates/own.jinja").write_text(TEMPLATE)
    for name in ("fetch_model", "fetch_data", "fetch_retention", "prepare", *STAGES):
        run(name, folder)
    return folder


def rows_of(folder) -> dict[str, torch.Tensor]:
    file = folder / "models/adapter/adapter_model.safetensors"
    return {k: v for k, v in load_file(file).items() if "lora_" not in k}


def test_rows_are_encoded_with_them(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "data/prepared/tokenizer")
    assert tokenizer.convert_tokens_to_ids(TOKENS) == IDS
    assert tokenizer.eos_token == "<|stop|>"
    about = json.loads((folder / "data/prepared/prepared.json").read_text())
    assert about["new_tokens"] == dict(zip(TOKENS[:3], IDS[:3], strict=True))
    assert about["known_tokens"] == {"<pad>": 3}
    assert (
        "plan: warning: lora.new_tokens: no training row has <pad>"
        in (folder / "plan.log").read_text().splitlines()
    )


def test_exactly_those_rows_train(folder):
    tied = AutoConfig.from_pretrained(folder / "models/base").tie_word_embeddings
    found = rows_of(folder)
    modules = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    key = "base_model.model.{}.token_adapter.trainable_tokens_delta"
    assert sorted(found) == sorted(key.format(module) for module in modules)
    base = AutoModelForCausalLM.from_pretrained(folder / "models/base", dtype=torch.float32)
    extend(base, 263, IDS[:3])
    for module in modules:
        change = (
            found[key.format(module)] - base.get_submodule(module).weight.data[[*IDS[3:], *IDS[:3]]]
        )
        assert (change.norm(dim=1)[1:] > 1e-2).all()
    trained = json.loads((folder / "metrics/train.json").read_text())["trainable_params"]
    lora = sum(
        v.numel() for v in load_file(folder / "models/adapter/adapter_model.safetensors").values()
    )
    assert trained == lora


def test_the_merge_is_pefts_own(folder):
    config = AutoConfig.from_pretrained(folder / "models/merged")
    tokenizer = AutoTokenizer.from_pretrained(folder / "models/release")
    merged = tensors(folder / "models/release")
    assert len(merged["model.embed_tokens.weight"]) == config.vocab_size
    assert config.vocab_size == max(260, len(tokenizer)) or config.vocab_size == 272
    source = "quantized" if "nf4" in (folder / "params.yaml").read_text() else "base"
    dtype = merged["model.embed_tokens.weight"].dtype
    model = AutoModelForCausalLM.from_pretrained(folder / f"models/{source}", dtype=dtype)
    if source == "quantized":
        model = model.dequantize(dtype=dtype)
    # As anybody does who loads such an adapter.
    if model.config.vocab_size < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer))
    own = PeftModel.from_pretrained(model.to(dtype), folder / "models/adapter").merge_and_unload()
    for name, tensor in own.state_dict().items():
        if name in merged:
            assert torch.equal(tensor, merged[name]), name


def test_the_template_alone_is_refused_with_the_remedy(folder):
    """The last test with this folder."""
    params = folder / "params.yaml"
    params.write_text(params.read_text().replace("  - <|stop|>\n", ""))
    stage = Stage("prepare", folder)
    assert stage.wait() == 1
    assert stage.said.splitlines()[-1] == (
        "prepare: prepare.template: writes <|stop|>, which the model has no token for; set "
        "lora.new_tokens: ['<|stop|>'], which adds and trains them, or another prepare.template, "
        "such as plain text with {prompt} in it"
    )
