"""Perplexity is exact: independent of batches and order, equal to a float64 loop of one row."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from stages.quantize import quantize
from stages.shared import scoring
from stages.shared.model import load_base
from stages.shared.scoring import head, score, scored_logits
from tests.tiny import SHAPE, make_model

CPU = torch.device("cpu")


def make_rows(count=13):
    draw = random.Random(3)
    rows = []
    for i in range(count):
        ids = [draw.randrange(3, 260) for _ in range(draw.randrange(4, 40))]
        # pad == eos == 2 stands at the end of the answer and must be scored.
        ids[-1] = 2
        known = draw.randrange(1, len(ids) - 1)
        labels = [-100] * known + ids[known:]
        rows.append({"row": str(i), "input_ids": ids, "labels": labels})
    return rows


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def model(request, tmp_path_factory):
    # gemma2 caps its logits: a plain product with the head would be wrong.
    folder = tmp_path_factory.mktemp(request.param)
    make_model(folder / "base", request.param)
    (folder / "nf4").mkdir()
    quantize(folder / "base", folder / "nf4", double_quant=True)
    return load_base(folder / "nf4", CPU)


def independent_perplexity(model, rows):
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0].double()
        for position, label in enumerate(row["labels"][1:]):
            if label != -100:
                total -= torch.log_softmax(logits[position], -1)[label].item()
                count += 1
    return math.exp(total / count), count


def test_equals_an_independent_float64_loop(model):
    rows = make_rows()
    expected, count = independent_perplexity(model, rows)
    scores = score(model, rows)
    assert sum(scores.tokens) == count
    assert scores.perplexity == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tokens_per_batch", [1, 64, 100_000])
def test_batch_size_and_order_do_not_matter(model, tokens_per_batch):
    rows = make_rows()
    expected = score(model, rows)
    shuffled = rows[::-1]
    scores = score(model, shuffled, tokens_per_batch)
    assert scores.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
    assert scores.nll[::-1] == pytest.approx(expected.nll, rel=1e-4)
    assert scores.tokens[::-1] == expected.tokens


def test_every_scored_token_comes_once_with_its_target(model, monkeypatch):
    monkeypatch.setattr(scoring, "LOGITS", 7 * 260 + 1)
    rows = make_rows()
    seen = [0] * len(rows)
    for index, targets, logits in scored_logits(model, rows, 128):
        assert logits.shape == (len(targets), 260)
        assert len(targets) <= 7
        assert logits.dtype == torch.float32
        for row, target in zip(index.tolist(), targets.tolist(), strict=True):
            labels = [label for label in rows[row]["labels"][1:] if label != -100]
            assert labels[seen[row]] == target
            seen[row] += 1
    assert seen == [sum(label != -100 for label in row["labels"][1:]) for row in rows]


def test_scoring_leaves_the_mode_as_it_was(model):
    for training in (True, False):
        model.train(training)
        score(model, make_rows(2))
        assert model.training is training


MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 1}
# Families that scale or cap their logits, each with its own name for it.
OWN_LOGITS = {
    "llama": {},
    # Calls the decoder within its backbone.
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "gemma2": {"final_logit_softcapping": 0.5},
    "granite": {"logits_scaling": 8.0},
    "granitemoehybrid": {
        "logits_scaling": 8.0,
        "layer_types": ["attention"] * 2,
        "num_local_experts": 0,
        "shared_intermediate_size": 128,
    },
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25},
    "minicpm3": {"dim_model_base": 16, "num_key_value_heads": 4},
    "falcon_h1": {"lm_head_multiplier": 0.25, **MAMBA},
    "recurrent_gemma": {"logits_soft_cap": 0.5, "lru_width": 64},
    "hyperclovax": {"logits_scaling": 4.0},
}


def random_model(family, settings):
    shape = SHAPE | {"pad_token_id": 2, "tie_word_embeddings": False} | settings
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **shape)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    # Far enough from zero for a cap to have an effect.
    model.get_output_embeddings().weight.data.normal_(0, 0.3)
    return model


@torch.no_grad()
@pytest.mark.parametrize(("family", "settings"), OWN_LOGITS.items(), ids=OWN_LOGITS)
def test_head_gives_the_logits_of_the_model(family, settings):
    model = random_model(family, settings)
    ids = torch.arange(3, 20)[None]
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    found, expected = head(model, hidden), model(ids, use_cache=False).logits[0]
    assert torch.equal(found, expected)
    # Of the plain product they differ where the family does something.
    plain = model.get_output_embeddings()(hidden)
    assert torch.allclose(found, plain) == (family in ("llama", "opt"))
    assert torch.equal(model(ids, use_cache=False).logits[0], expected)


def test_perplexity_has_a_bound_and_knows_nan():
    assert scoring.perplexity(2.5) == math.exp(2.5)
    assert scoring.perplexity(701.0) == scoring.perplexity(math.inf) == math.exp(700)
    assert math.isnan(scoring.perplexity(math.nan))
    assert scoring.Scores([1.0, 5.0], [1, 2]).perplexity == math.exp(2)


def test_batches_are_padded_on_the_right():
    found = scoring._padded([{"input_ids": [7, 8, 9]}, {"input_ids": [5]}])
    assert found["input_ids"].tolist() == [[7, 8, 9], [5, 0, 0]]
    assert found["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert {each.dtype for each in found.values()} == {torch.long}
    assert set(found) == {"input_ids", "attention_mask"}


def test_so_many_ranks_can_score_as_there_are_batches():
    rows = [{"input_ids": [3] * 4096}] * 3 + [{"input_ids": [3] * 1024}] * 5
    assert scoring.batch_count(rows) == 5


def test_ranks_have_together_what_one_has(model):
    rows = make_rows()
    told = []

    def keep(value):
        told.append(value)
        return [value]

    for rank in range(3):
        score(model, rows, 64, SimpleNamespace(rank=rank, size=3, gather=keep))
    assert all(sum(tokens) > 0 for _, tokens in told)
    world = SimpleNamespace(rank=0, size=3, gather=lambda value: told)
    assert score(model, rows, 64, world) == score(model, rows, 64)


def test_who_streams_the_weights_is_asked(model, monkeypatch):
    asked, last_hidden_states = [], scoring.last_hidden_states

    def noted(causal, inputs, streamer):
        asked.append(streamer)
        assert all(each["use_cache"] is False for each in inputs)
        return last_hidden_states(causal, inputs, None)

    monkeypatch.setattr(scoring, "last_hidden_states", noted)
    streamer = object()
    score(model, make_rows(2), streamer=streamer)
    assert asked == [streamer]


def test_scoring_is_for_the_model_below_an_adapter_and_keeps_no_graph(model):
    adapted = get_peft_model(random_model("llama", {}), LoraConfig(target_modules=["q_proj"]))
    for _, _, logits in scored_logits(adapted, make_rows(2)):
        assert not logits.requires_grad
    # Dropout, which training switches on, is off meanwhile.
    adapted.train()
    scored = scored_logits(adapted, make_rows(2))
    next(scored)
    assert not adapted.training


def test_head_leaves_a_forward_that_was_put_in_place_before():
    model, seen = random_model("llama", {}), []
    forward = model.base_model.forward
    model.base_model.forward = lambda *args, **kwargs: seen.append(1) or forward(*args, **kwargs)
    own = model.base_model.forward
    head(model, torch.zeros(3, 64))
    assert seen == []
    assert model.base_model.forward is own
    bare = random_model("llama", {})
    head(bare, torch.zeros(3, 64))
    assert "forward" not in vars(bare.base_model)


def test_what_a_backbone_gives_beside_hidden_states_is_nothing():
    given = scoring._Given(last_hidden_state=torch.zeros(1))
    assert given.router_logits is None
    with pytest.raises(AttributeError, match=r"^__other__$"):
        given.__other__  # noqa: B018


def test_autocast_is_for_16_bits_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *arguments: arguments)
    found = {}
    for device in ("cpu", "cuda"):
        for dtype in (torch.float32, torch.bfloat16):
            embeddings = SimpleNamespace(weight=torch.empty(0, dtype=dtype))
            model = SimpleNamespace(
                device=SimpleNamespace(type=device),
                get_output_embeddings=lambda found=embeddings: found,
            )
            found[device, dtype] = scoring._autocast(model)
    asked = {key: context for key, context in found.items() if isinstance(context, tuple)}
    assert asked == {("cuda", torch.bfloat16): ("cuda", torch.bfloat16)}
