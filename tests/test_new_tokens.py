"""lora.new_tokens: a base model without chat tokens gets a template that writes some."""

import contextlib
import json
import shutil
import signal

import pytest
import torch
import yaml
from datasets import Dataset
from families import FAMILIES, config_of
from merging import tensors
from peft import PeftModel
from quick import Stage, run
from safetensors.torch import load_file
from tiny import PARAMS, make_model, make_tokenizer, make_workspace
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from stages.planning.new_rows import check_new_rows
from stages.preparing.formats import Format
from stages.preparing.templates import settle
from stages.shared.embeddings import extend
from stages.shared.fast_path import FastPath
from stages.shared.model import load_base
from stages.shared.params import Params, Prepare
from stages.shared.placement import Placement
from stages.shared.process import StageError
from stages.shared.workload import Lengths
from stages.training import building
from stages.training.building import TrainingSet, build_trainer

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


WEIGHTS = "models/adapter/adapter_model.safetensors"


def rows_of(folder) -> dict[str, torch.Tensor]:
    return {k: v for k, v in load_file(folder / WEIGHTS).items() if "lora_" not in k}


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
        before = base.get_submodule(module).weight.data[[*IDS[3:], *IDS[:3]]]
        assert ((found[key.format(module)] - before).norm(dim=1)[1:] > 1e-2).all()
    count = json.loads((folder / "metrics/train.json").read_text())["trainable_params"]
    assert count == sum(tensor.numel() for tensor in load_file(folder / WEIGHTS).values())
    plan = json.loads((folder / "metrics/plan.json").read_text())
    assert plan["adapter_gb"] * 1e9 == pytest.approx(4 * count)


def test_the_merge_is_pefts_own(folder):
    config = AutoConfig.from_pretrained(folder / "models/merged")
    tokenizer = AutoTokenizer.from_pretrained(folder / "models/release")
    merged = tensors(folder / "models/release")
    assert len(merged["model.embed_tokens.weight"]) == config.vocab_size
    assert config.vocab_size == (263 if config.tie_word_embeddings else 272)
    assert len(tokenizer) == 263
    source = "quantized" if "nf4" in (folder / "params.yaml").read_text() else "base"
    dtype = merged["model.embed_tokens.weight"].dtype
    model = AutoModelForCausalLM.from_pretrained(folder / f"models/{source}", dtype=dtype)
    if source == "quantized":
        model = model.dequantize(dtype=dtype)
    # Like any user who loads such an adapter.
    if model.config.vocab_size < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer))
    own = PeftModel.from_pretrained(model.to(dtype), folder / "models/adapter").merge_and_unload()
    for name, tensor in own.state_dict().items():
        if name in merged:
            assert torch.equal(tensor, merged[name]), name


def test_a_killed_run_ends_with_the_same_bytes(folder, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(folder, project, ignore=shutil.ignore_patterns("adapter", "release", "merged"))
    stage = Stage("train", project, CHECKPOINT_SECONDS="0")
    seal = "checkpoint-5/SHA256SUMS"
    assert stage.until(lambda: any(project.glob(f"checkpoints/*/{seal}")))
    stage.kill(signal.SIGKILL)
    assert stage.wait() != 0
    # The rows, not the whole extended matrix.
    [saved, *_] = project.glob("checkpoints/*/checkpoint-5/adapter_model.safetensors")
    assert load_file(saved).keys() == load_file(folder / WEIGHTS).keys()
    again = run("train", project)
    assert "train: resuming from checkpoint-" in again.said
    assert (project / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_trls_head_is_taken(folder):
    """Otherwise all logits would be in memory at once."""
    assert "trl's output head" not in (folder / "train.log").read_text()


def test_the_template_alone_is_refused_with_the_remedy(folder):
    """The last test with this folder."""
    params = folder / "params.yaml"
    params.write_text(params.read_text().replace("  - <|stop|>\n", ""))
    stage = Stage("prepare", folder)
    assert stage.wait() == 1
    assert stage.said.splitlines()[-1] == (
        "prepare: prepare.template: writes <|stop|>, which the model has no token for; set "
        "lora.new_tokens: ['<|stop|>'], which adds and trains them, or another prepare.template, "
        "such as plain text that contains {prompt}"
    )


PREPARE = yaml.safe_load(PARAMS.read_text())["prepare"]
ROWS = [[2 + i, 262, 9, 261, 40 + i, 260] for i in range(4)]


@pytest.mark.parametrize("head", ["trl's", "its own"])
@pytest.mark.parametrize(("arch", "tied"), [("gemma", True), ("cohere", True), ("llama", False)])
def test_gradients_are_those_of_pefts_layers(arch, tied, head, tmp_path, monkeypatch):
    """They copy the whole matrix and make a gradient of all of it."""
    make_model(tmp_path / "base", arch, tie_word_embeddings=tied)
    params = Params.model_validate(yaml.safe_load(PARAMS.read_text()))
    rows = Dataset.from_dict({"input_ids": ROWS, "labels": ROWS})
    data = TrainingSet(rows, make_tokenizer(tmp_path / "tokenizer"), 60, (7, 260, 261, 262))
    fast = FastPath("sdpa", padding_free=False, liger=False, fused_lora=False)

    def trained(own: bool) -> tuple[float, dict[str, torch.Tensor]]:
        base = load_base(tmp_path / "base", torch.device("cpu"))
        extend(base, 263, (260, 261, 262))
        if not own:
            monkeypatch.setattr(building, "train_rows", lambda _: None)
        trainer = build_trainer(base, data, params, fast, Placement(2, 2), tmp_path / "out")
        assert trainer.fused_head == own
        trainer.fused_head &= head == "trl's"
        for name, parameter in trainer.model.named_parameters():
            if "trainable_tokens_delta" in name:
                draw = torch.Generator().manual_seed(3)
                parameter.data.normal_(0, 0.05, generator=draw)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=20)
        loss.backward()
        named = trainer.model.named_parameters()
        return loss.item(), {n: p.grad for n, p in named if p.requires_grad}

    loss, grads = trained(own=True)
    expected, of_peft = trained(own=False)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert grads.keys() == of_peft.keys()
    assert sum("trainable_tokens_delta" in name for name in grads) == (1 if tied else 2)
    for name, grad in of_peft.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "ids", "fault"),
    [
        ("phi", (3,), "its output head has a bias, which PEFT leaves out where it trains rows"),
        ("gemma3n_text", (264,), "it has embeddings for each layer, which would need further rows"),
        ("gemma3n_text", (263,), None),
        ("phi", (), None),
        ("llama", (400,), None),
    ],
)
def test_plan_refuses_what_cannot_have_such_rows(kind, ids, fault, tmp_path):
    config_of(FAMILIES[kind]).save_pretrained(tmp_path)
    rows = Lengths([4], [4], 60, ids)
    if fault is None:
        check_new_rows(tmp_path, rows)
        return
    with pytest.raises(StageError, match=f"lora.new_tokens: not supported for {kind}: {fault}"):
        check_new_rows(tmp_path, rows)


def test_only_marks_that_the_template_writes_itself_are_refused(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    asked = '<|a|> <|a"b|> <|a\\b|>'
    chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": "b"}]
    said = {}
    for template in ("[INST] {prompt} [/INST] ### Response:", "<|start|>{prompt}"):
        params = Prepare.model_validate(PREPARE | {"template": template})
        with contextlib.suppress(StageError):
            said[template] = settle(tokenizer, params, Format("messages", {}), [chat])
    assert list(said) == ["[INST] {prompt} [/INST] ### Response:"]
    # The own template of a model may intend it; a message says so.
    tokenizer.chat_template = (
        "{% for m in messages %}<|x|>{{ m['content'] + eos_token }}{% endfor %}"
    )
    own = Prepare.model_validate(PREPARE | {"template": "chat"})
    assert "; not tokens of this model, so learned letter by letter: <|x|>" in settle(
        tokenizer, own, Format("messages", {}), [chat]
    )
