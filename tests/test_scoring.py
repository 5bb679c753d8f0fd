"""Perplexity is exact: independent of batches and order, equal to a float64 loop of one row."""

import math
import random

import pytest
import torch

from stages.quantize import quantize
from stages.shared import scoring
from stages.shared.model import load_base
from stages.shared.process import StageError
from stages.shared.scoring import head, score, scored_logits
from tests.tiny import make_model

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


def test_scaled_logits_are_refused(model):
    model.config.logit_scale = 0.5
    try:
        with pytest.raises(StageError, match="logit_scale"):
            head(model, torch.zeros(1, 64))
    finally:
        del model.config.logit_scale
