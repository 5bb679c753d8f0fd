"""The trainer: its batch, its counts, its first step, and no attention dropout."""

import importlib.util
from dataclasses import replace
from functools import cached_property
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset
from families import FAMILIES
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from stages.shared.fast_path import FLATTENED, FastPath, choose_fast_path
from stages.shared.model import load_base
from stages.shared.params import Params
from stages.shared.placement import Placement
from stages.shared.ranks import ALONE
from stages.shared.scoring import Scores
from stages.training import progress
from stages.training.adjusting import leave_out_attention_dropout
from stages.training.building import TrainingSet, as_installed, build_trainer
from stages.training.progress import WARM_STEPS, Progress
from tests.tiny import PARAMS, SHAPE, make_model, make_tokenizer

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
PLAIN = FastPath("sdpa", padding_free=False, liger=False, fused_lora=False)
FUSED = FastPath("sdpa", padding_free=False, liger=False, fused_lora=True)
ROWS = 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def build(tmp_path, tokenizer):
    """A function that makes a trainer of 20 rows of unlike length, with changed parameters."""

    def build(fast=PLAIN, model=None, lora=None, **train):
        raw = yaml.safe_load(PARAMS.read_text())
        raw["lora"] |= lora or {}
        raw["train"] |= {"batching": "shuffle", **train}
        ids = [[3 + i] * (10 + i) for i in range(ROWS)]
        rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
        make_model(tmp_path / "base", **model or {})
        base = load_base(tmp_path / "base", CPU, fast.attention)
        data = TrainingSet(rows, tokenizer, 160)
        return build_trainer(
            base, data, Params.model_validate(raw), fast, Placement(), tmp_path / "out"
        )

    return build


def test_one_process_trains_on_one_gpu(build, monkeypatch):
    find = TrainingArguments._setup_devices.func

    def find_two(config):
        device = find(config)
        config._n_gpu = 2
        return device

    found = cached_property(find_two)
    found.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", found)
    assert TrainingArguments(per_device_train_batch_size=4).train_batch_size == 8
    trainer = build(batch_size=4)
    assert trainer.args.n_gpu == 1
    assert trainer.get_train_dataloader().total_batch_size == 4


class Seen(TrainerCallback):
    """Tokens of the batches that the model was given."""

    tokens = 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.register_forward_pre_hook(self._add, with_kwargs=True)

    def _add(self, module, positional, inputs):
        self.tokens += int(inputs["attention_mask"].sum())


@pytest.mark.parametrize("epochs", [0.4, 1.0, 1.7])
def test_tokens_are_those_that_were_trained_on(build, epochs):
    trainer, seen = build(batch_size=8, epochs=epochs), Seen()
    trainer.add_callback(seen)
    trainer.train()
    assert trainer.tokens == seen.tokens > 0


def history_of(steps, monkeypatch, history=()):
    """(callback, log_history) after `steps`, of as many seconds and tokens as each entry says; the
    last one is saved."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    scores = Scores([1.0], [1])
    trainer = SimpleNamespace(tokens=0, world=ALONE, score=lambda *_: scores)
    callback = Progress(trainer, [], 100, SimpleNamespace(took=0.0))
    state = TrainerState(log_history=list(history), max_steps=1000)
    model = SimpleNamespace(device=CPU)
    callback.on_train_begin(None, state, None)
    for i, (seconds, tokens) in enumerate(steps):
        clock.now += seconds
        trainer.tokens += tokens
        state.global_step += 1
        control = TrainerControl(should_save=i == len(steps) - 1)
        callback.on_step_end(None, state, control, model=model)
    callback.on_train_end(None, state, None)
    return callback, state.log_history


SLOW, QUICK = (10.0, 100), (1.0, 100)


def test_a_resumed_run_has_the_rates_of_the_whole(monkeypatch):
    steps = [SLOW] * WARM_STEPS + [QUICK] * 7
    whole, _ = history_of(steps, monkeypatch)
    assert whole.cost()["steady_tokens_per_second"] == 100
    _, saved = history_of(steps, monkeypatch)
    resumed, _ = history_of(steps, monkeypatch, saved)
    assert resumed.tokens == 2 * whole.tokens
    cost = resumed.cost()
    assert cost["train_seconds"] == 2 * whole.cost()["train_seconds"]
    assert cost["tokens_per_second"] == pytest.approx(whole.cost()["tokens_per_second"])
    assert cost["steady_tokens_per_second"] == 100


def test_a_run_of_few_steps_has_one_rate(monkeypatch):
    """Also one that was killed so often that no process came to a steady step."""
    few, saved = history_of([SLOW] * WARM_STEPS, monkeypatch)
    resumed, _ = history_of([SLOW] * WARM_STEPS, monkeypatch, saved)
    for callback in (few, resumed):
        cost = callback.cost()
        assert cost["steady_tokens_per_second"] == cost["tokens_per_second"] == 10


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
def test_a_single_step_moves_every_adapter(build, schedule):
    trainer = build(batch_size=ROWS, schedule=schedule, warmup_ratio=0.1)
    trainer.train()
    assert trainer.state.global_step == 1
    moved = [p.any().item() for n, p in trainer.model.named_parameters() if ".lora_B." in n]
    assert all(moved)
    assert len(moved) == 2 * 7


def test_several_steps_warm_up(build):
    trainer = build(batch_size=ROWS // 2, warmup_ratio=0.1)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates[0] == 0 < rates[1]


def gradients(trainer):
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if ".lora_B." in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    ids = torch.arange(3, 3 + 2 * 24).view(2, 24)
    trainer.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fast", [PLAIN, FUSED], ids=["plain", "fused"])
def test_attention_drops_nothing_on_any_path(build, capsys, fast, checkpointing):
    """attention_dropout would draw another mask when fused layers are recomputed."""
    expected = gradients(build(lora={"dropout": 0.0}))
    said = "train: the base's attention_dropout (0.3) is switched off\n"
    assert said not in capsys.readouterr().out
    dropping = {"attention_dropout": 0.3}
    trainer = build(fast, dropping, {"dropout": 0.0}, gradient_checkpointing=checkpointing)
    assert said in capsys.readouterr().out
    found = gradients(trainer)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() < 1e-4 * expected[name].norm(), name


@pytest.mark.parametrize("installed", [True, False])
def test_liger_is_planned_with_everywhere_and_taken_where_it_is(monkeypatch, capsys, installed):
    """plan.json must not depend on the machine."""
    spec = object() if installed else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    params = Params.model_validate(yaml.safe_load(PARAMS.read_text()))
    config = AutoConfig.for_model("llama")
    planned = choose_fast_path(params, config, gpu=True)
    assert planned.liger
    assert as_installed(planned, config).liger is installed
    said = capsys.readouterr().out
    assert ("requirements-kernels.lock" in said) is not installed
    assert as_installed(PLAIN, config) is PLAIN
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("family", sorted(FLATTENED))
def test_no_family_of_the_fast_path_drops_weights(build, family):
    peculiar = FAMILIES[family].settings if family == "gemma3n_text" else {}
    dropping = peculiar | {"arch": family, "attention_dropout": 0.5}
    # Other shares are dropped by modules of their own, the same on every path.
    for other in ("resid_pdrop", "embd_pdrop", "hidden_dropout", "residual_dropout"):
        dropping[other] = 0.0
    eager = replace(PLAIN, attention="eager")
    model = build(eager, dropping | {"embedding_dropout": 0.0}, {"dropout": 0.0}).model.train()
    ids = torch.arange(3, 3 + 24)[None]
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["gpt_bigcode", "gptj", "gpt_neo", "bloom"])
def test_attention_of_older_families_drops_nothing(family):
    """Some name the rate otherwise, or hold it in a module of its own."""
    rates = {"attn_pdrop": 0.5, "attention_dropout": 0.5, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    rates |= {"resid_dropout": 0.0, "embed_dropout": 0.0}
    config = AutoConfig.for_model(family, **SHAPE | FAMILIES[family].settings | rates)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    ids = torch.arange(3, 3 + 24)[None]
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert leave_out_attention_dropout(model) == 0.5
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("size", "times", "fused_head"), [(4, 2, True), (2, 4, True), (2, 4, False)]
)
def test_a_step_has_one_gradient_however_it_is_split(build, size, times, fused_head):
    """Rows have different lengths: a loss divided by a micro-batch's own tokens would differ."""

    class First(TrainerCallback):
        def __init__(self):
            self.gradients = {}

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
            self.gradients = self.gradients or {n: p.grad.clone() for n, p in trained}

    found = []
    for split in ((8, 1), (size, times)):
        first = First()
        trainer = build(batch_size=split[0], gradient_accumulation=split[1])
        assert trainer.fused_head
        trainer.fused_head = fused_head
        generator = torch.Generator().manual_seed(1)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1, generator=generator)
        trainer.add_callback(first)
        trainer.train()
        found.append(first.gradients)
    whole, parts = found
    assert len(whole) == len(parts) == 2 * 7 * 2
    norm = torch.stack([gradient.norm() for gradient in whole.values()]).norm()
    error = torch.stack([(parts[name] - whole[name]).norm() for name in whole]).norm()
    assert error < 1e-5 * norm
