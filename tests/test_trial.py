"""Two rows are tried before training: a difference from the model itself is mended or reported."""

from dataclasses import replace

import pytest
import torch
import yaml
from bitsandbytes.nn import Params4bit
from datasets import Dataset
from families import FAMILIES
from transformers import masking_utils
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from stages.quantize import quantize
from stages.shared import own_logits
from stages.shared.fast_path import FastPath
from stages.shared.model import load_base
from stages.shared.params import Params
from stages.shared.placement import Placement
from stages.shared.process import StageError
from stages.training import attention, building, fused_lora, trial
from stages.training.building import TrainingSet, build_trainer
from tests.test_attention import reference
from tests.tiny import PARAMS, make_model, make_tokenizer

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
PLAIN = FastPath("sdpa", padding_free=False, liger=False, fused_lora=False)
FLAT = FastPath("sdpa", padding_free=True, liger=False, fused_lora=False)
FUSED = FastPath("sdpa", padding_free=False, liger=False, fused_lora=True)
IDS = [[3 + i, 90 + 7 * i] * (10 + i) for i in range(6)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def build(tmp_path, tokenizer):
    def build(fast=PLAIN, arch="llama", shape=None, batching="shuffle", dense=None):
        """With `dense`: on a base in NF4."""
        raw = yaml.safe_load(PARAMS.read_text())
        raw["train"] |= {"batching": batching, "batch_size": 2}
        make_model(tmp_path / "base", arch, **shape or {})
        kind = "eager" if arch == "recurrent_gemma" else fast.attention
        folder = tmp_path / ("base" if dense is None else "nf4")
        if dense is not None:
            folder.mkdir(exist_ok=True)
            quantize(tmp_path / "base", folder, double_quant=True)
        base = load_base(folder, CPU, kind)
        # Far enough from zero for a cap to be felt, and for one row to change another.
        base.get_output_embeddings().weight.data.mul_(20)
        data = TrainingSet(Dataset.from_dict({"input_ids": IDS, "labels": IDS}), tokenizer, 60)
        params = Params.model_validate(raw)
        placed = Placement(2, 2, dense=dense or 0)
        return build_trainer(base, data, params, fast, placed, tmp_path / "out")

    return build


def loss_of(trainer):
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    return trainer.compute_loss(trainer.model, batch, num_items_in_batch=40).item()


class NoTrial:
    def __init__(self, model, rows):
        pass

    def batches(self, model, fast, packing):
        return fast

    def fused_head(self, causal):
        return True

    def fused_layers(self, model, fuse):
        fuse()
        return True


def state_of(trainer):
    """All that the check might change: random states, adapter, modes, and the loss."""
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    modes = [module.training for module in trainer.model.modules()]
    return torch.random.get_rng_state(), trained, modes, loss_of(trainer)


@pytest.mark.parametrize("fast", [PLAIN, FLAT, FUSED])
def test_a_trial_leaves_everything_as_it_was_and_says_nothing(build, fast, capsys, monkeypatch):
    draws, adapter, modes, loss = state_of(build(fast))
    assert "they differ" not in capsys.readouterr().out
    monkeypatch.setattr(building, "Trial", NoTrial)
    others = state_of(build(fast))
    assert torch.equal(draws, others[0])
    assert all(torch.equal(adapter[name], others[1][name]) for name in adapter)
    assert (modes, loss) == others[2:]
    assert all(adapter[name].any() == ("lora_A" in name) for name in adapter)


@pytest.fixture
def leaking(monkeypatch):
    """Some families build masks of their own and attend across concatenated rows."""
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda *_: None)


VARIABLE = FastPath("varlen", padding_free=True, liger=False, fused_lora=False)


@pytest.mark.parametrize("arch", ["llama", "stablelm"])
def test_variable_length_attention_is_held_to_that_of_transformers(
    build, arch, capsys, monkeypatch
):
    """stablelm does not pass positions to it."""
    monkeypatch.setattr(attention, "varlen_attn", reference)
    trainer = build(VARIABLE, arch)
    assert trainer.model.config._attn_implementation == "varlen"
    assert trainer.args.padding_free == (arch == "llama")
    assert ("they are padded" in capsys.readouterr().out) == (arch == "stablelm")
    assert loss_of(trainer) == pytest.approx(loss_of(build(PLAIN, arch)), rel=1e-5)
    monkeypatch.setattr(attention, "varlen_attn", lambda *args, **options: args[2])
    with pytest.raises(StageError, match=rf"^train.attention: with varlen, {arch} does not give"):
        build(VARIABLE, arch)


def test_packs_whose_rows_see_each_other_are_refused(build, leaking):
    with pytest.raises(StageError) as error:
        build(FLAT, batching="packing")
    said = (
        "train.batching: packed rows of llama do not give the logits of each row alone (they differ"
    )
    assert str(error.value).startswith(said)


def test_batches_whose_rows_see_each_other_are_padded(build, leaking, capsys):
    trainer = build(FLAT)
    assert "they are padded instead" in capsys.readouterr().out
    assert not trainer.args.padding_free
    found = loss_of(trainer)
    assert found == pytest.approx(loss_of(build(PLAIN)), rel=1e-6)


def test_gpt_oss_is_seen_to_leak(build, capsys):
    """Without a list of families: its rows are padded, and packs are refused."""
    eager = replace(FLAT, attention="eager")
    shape = FAMILIES["gpt_oss"].settings
    with pytest.raises(StageError, match=r"packed rows of gpt_oss .*set group_by_length$"):
        build(eager, "gpt_oss", shape, batching="packing")
    trainer = build(eager, "gpt_oss", shape)
    assert "concatenated rows of gpt_oss do not" in capsys.readouterr().out
    assert not trainer.args.padding_free


def test_a_family_that_raises_is_refused_in_one_line(build):
    """Its convolutions cross row boundaries, which is reported."""
    shape = {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16}
    with pytest.raises(StageError, match=r"packed rows of lfm2 .*causal_conv1d.*group_by_length$"):
        build(FLAT, "lfm2", shape, batching="packing")


def test_a_cap_that_trl_does_not_know_is_kept_in_training(build, capsys):
    shape = {"logits_soft_cap": 0.5, "lru_width": 64, "num_key_value_heads": 1}
    trainer = build(PLAIN, "recurrent_gemma", shape)
    assert (
        "trl's output head does not give the logits of recurrent_gemma" in capsys.readouterr().out
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    own = trainer.model(**batch, use_cache=False, num_items_in_batch=40)
    found = loss_of(trainer)
    assert found == pytest.approx(own.loss.item(), rel=1e-5)
    trainer.fused_head = True
    assert abs(found - loss_of(trainer)) > 0.01 * found


def test_fused_layers_that_compute_something_else_give_way_to_those_of_peft(
    build, capsys, monkeypatch
):
    right = fused_lora._Products.scaled_b
    monkeypatch.setattr(
        fused_lora._Products, "scaled_b", lambda self, i, dtype: 1.1 * right(self, i, dtype)
    )
    trainer, plain = build(FUSED), build(PLAIN)
    assert "PEFT's are used, which are slower" in capsys.readouterr().out
    for each in (trainer, plain):
        for name, parameter in each.model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(0.05)
    assert loss_of(trainer) == loss_of(plain)


def packed_weights(trainer):
    return sum(isinstance(p, Params4bit) for p in trainer.model.parameters())


def test_training_with_weights_in_16_bit_writes_the_same_bytes(build, tmp_path):
    found = []
    for dense in (0, 1, 2):
        trainer = build(FUSED, dense=dense)
        assert packed_weights(trainer) == 7 * (2 - dense)
        assert (trainer.dense_bytes > 0) == (dense > 0)
        counts = trainer.model.get_nb_trainable_parameters()
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trainer.model.save_pretrained(str(tmp_path / "adapter"))
        saved = (tmp_path / "adapter/adapter_model.safetensors").read_bytes()
        found.append((counts, losses, saved))
    assert len(found[0][1]) > 1
    assert found[0] == found[1] == found[2]


def test_layers_that_give_way_to_those_of_peft_stay_packed(build, monkeypatch):
    """Those of PEFT cannot read weights in 16 bit in bitsandbytes' layers."""
    loss = loss_of(build(PLAIN, dense=2))
    monkeypatch.setattr(building.Trial, "fused_layers", lambda *_: False)
    trainer = build(FUSED, dense=2)
    assert packed_weights(trainer) == 7 * 2
    assert loss_of(trainer) == loss


@pytest.mark.parametrize("fast", [PLAIN, FLAT, FUSED])
def test_everything_is_tried_as_it_trains(build, fast, monkeypatch):
    """Without gradients bitsandbytes computes by kernels that training never uses."""
    right, tried = LlamaRMSNorm.forward, []

    def noted(self, x):
        tried.append(torch.is_grad_enabled() and x.requires_grad)
        return right(self, x)

    monkeypatch.setattr(LlamaRMSNorm, "forward", noted)
    # It compares two passes of scoring.
    monkeypatch.setattr(trial, "check_head", lambda *_: None)
    build(fast)
    assert len(tried) > 4
    assert all(tried)


def test_scoring_that_has_other_logits_than_the_model_is_refused(tmp_path, monkeypatch):
    make_model(tmp_path / "base", "gemma2")
    base = load_base(tmp_path / "base", CPU)
    own_logits.check_head(base, IDS[:1])
    monkeypatch.setattr(own_logits, "head", lambda model, hidden: model.lm_head(hidden * 1.01))
    with pytest.raises(StageError, match=r"^gemma2: scoring does not reproduce the model's logits"):
        own_logits.check_head(base, IDS)
