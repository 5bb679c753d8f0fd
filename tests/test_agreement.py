"""KL divergence, agreement and perplexity of two models, on given logits."""

import io
import math
import threading
from types import SimpleNamespace

import pytest
import torch

from stages.shared.ranks import ALONE
from stages.verifying import agreement
from stages.verifying.agreement import Reference, reference

VOCABULARY = 5
# (row, target) of every scored token, in chunks as scored_logits gives them, longest row first.
CHUNKS = [[(2, 1), (2, 4)], [(2, 0), (0, 3)], [(0, 2), (1, 1), (3, 3)], [(3, 0)]]
TOKENS = [token for chunk in CHUNKS for token in chunk]
ROWS = [{"labels": [-100, 7, 7]}, {"labels": [7, 7]}, {"labels": [7, 7, 0, 7]}]
ROWS.append({"labels": [-100, -100, 7, 7]})
STREAMER = object()


class Model:
    """Logits of every scored token [8, 5], similar to those of other seeds."""

    def __init__(self, seed):
        common, own = (
            torch.randn(len(TOKENS), VOCABULARY, generator=torch.Generator().manual_seed(number))
            for number in (0, seed)
        )
        self.logits = 2 * common + own

    def get_output_embeddings(self):
        return SimpleNamespace(weight=torch.empty(VOCABULARY, 3))


@pytest.fixture(autouse=True)
def scored(monkeypatch):
    def chunks(model, rows, *, world, streamer):
        assert rows is ROWS
        assert streamer is STREAMER
        start = 0
        for number, chunk in enumerate(CHUNKS):
            part = model.logits[start : start + len(chunk)]
            start += len(chunk)
            if number % world.size == world.rank:
                index, targets = (torch.tensor(each) for each in zip(*chunk, strict=True))
                yield index, targets, part

    monkeypatch.setattr(agreement, "scored_logits", chunks)


def compare(first, second, world=ALONE):
    ref = reference(first, ROWS, io.BytesIO(), world, STREAMER)
    return ref, agreement.agreement(second, ROWS, ref, STREAMER)


def probabilities(logits):
    exact = [math.exp(value) for value in logits.tolist()]
    return [value / math.fsum(exact) for value in exact]


def divergence(p, q):
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def nll_of(model):
    each = zip(model.logits, TOKENS, strict=True)
    return math.fsum(-math.log(probabilities(logits)[target]) for logits, (_, target) in each)


def test_figures_are_those_of_a_plain_loop():
    first, second = Model(1), Model(2)
    ref, found = compare(first, second)
    assert ref.tokens == len(TOKENS) == 8
    assert ref.nll == pytest.approx(nll_of(first) / 8, rel=1e-6)
    assert ref.perplexity == math.exp(ref.nll)
    assert found.perplexity == pytest.approx(math.exp(nll_of(second) / 8), rel=1e-6)
    pairs = list(zip(first.logits, second.logits, strict=True))
    kl = [divergence(probabilities(p), probabilities(q)) for p, q in pairs]
    # More digits than float32 has.
    assert found.mean_kl == pytest.approx(math.fsum(kl) / 8, rel=1e-10)
    assert found.max_kl == pytest.approx(max(kl), rel=1e-10)
    assert found.kl_tokens == 8
    same = sum(int(p.argmax()) == int(q.argmax()) for p, q in pairs)
    assert 0 < same < 8
    assert found.token_agreement == same / 8
    assert found.nonfinite == 0
    # With the models exchanged it is another number.
    assert found.max_kl != pytest.approx(compare(second, first)[1].max_kl, rel=0.01)


def test_a_model_agrees_with_itself():
    _, found = compare(Model(1), Model(1))
    assert (found.mean_kl, found.max_kl, found.token_agreement) == (0, 0, 1)


def test_kl_smaller_than_float32_holds_is_seen():
    """As of a good merge: 1e-7 and less."""
    first, second = Model(1), Model(1)
    second.logits[:, 0] += 1e-4
    _, found = compare(first, second)
    pairs = zip(first.logits, second.logits, strict=True)
    kl = [divergence(probabilities(p), probabilities(q)) for p, q in pairs]
    assert 0 < found.mean_kl < 1e-8
    assert found.mean_kl == pytest.approx(math.fsum(kl) / 8, rel=1e-3)


@pytest.mark.parametrize(
    ("room", "every"), [(8 * 20, 1), (8 * 20 - 1, 2), (4 * 20, 2), (4 * 20 - 1, 3), (1, 160)]
)
def test_beyond_its_size_the_cache_holds_every_nth_row(monkeypatch, room, every):
    """A token takes 20 bytes."""
    monkeypatch.setattr(agreement, "MAX_CACHE_BYTES", room)
    first, second = Model(1), Model(2)
    ref, found = compare(first, second)
    kept = [i for i, (row, _) in enumerate(TOKENS) if row % every == 0]
    assert ref.every == every
    assert ref.cache.getvalue() == first.logits[kept].numpy().tobytes()
    pairs = [(first.logits[i], second.logits[i]) for i in kept]
    kl = [divergence(probabilities(p), probabilities(q)) for p, q in pairs]
    assert (found.kl_tokens, found.mean_kl) == (len(kept), pytest.approx(math.fsum(kl) / len(kept)))


def test_chunks_of_any_size_give_the_same(monkeypatch):
    expected = compare(Model(1), Model(2))[1]
    for size in (1, 3, 64):
        monkeypatch.setattr(agreement, "KL_CHUNK", size)
        assert compare(Model(1), Model(2))[1] == expected


def test_ruined_models_have_figures():
    ruined = Model(2)
    ruined.logits[3, 1], ruined.logits[5, 0], ruined.logits[5, 1] = math.nan, math.inf, -math.inf
    _, found = compare(Model(1), ruined)
    assert found.nonfinite == 3
    assert math.isnan(found.mean_kl)
    assert math.isnan(found.max_kl)
    assert math.isnan(found.perplexity)
    certain = Model(2)
    certain.logits[0] = torch.tensor([-math.inf] * 4 + [0.0])
    _, found = compare(Model(1), certain)
    assert found.nonfinite == 4
    assert found.max_kl == math.inf
    assert found.perplexity == math.exp(700)


def test_sums_of_what_is_not_finite():
    assert agreement._sum([0.1] * 10) == 1.0
    assert math.isnan(agreement._sum([math.inf, -math.inf]))
    assert math.isnan(agreement._sum([1e308, 1e308]))


def test_losses_are_summed_in_float64():
    """Otherwise a large term would absorb the others."""
    logits = torch.tensor([[0.0, -(2.0**24)], *[[0.0, 0.0]] * 8])
    total = agreement._nll(logits, torch.ones(9, dtype=torch.long))
    assert total == pytest.approx(2**24 + 8 * math.log(2), rel=1e-9)


class Rank:
    """Run two of them in threads."""

    size = 2

    def __init__(self, rank, told, barrier):
        self.rank, self.told, self.barrier = rank, told, barrier

    def gather(self, value):
        self.told[self.rank] = value
        self.barrier.wait(10)
        found = list(self.told)
        self.barrier.wait(10)
        return found


def test_ranks_share_the_batches_and_have_the_same_figures():
    ref, expected = compare(Model(1), Model(2))
    told, barrier, found = [None] * 2, threading.Barrier(2), {}

    def work(rank):
        found[rank] = compare(Model(1), Model(2), Rank(rank, told, barrier))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own, figures in found.values():
        assert isinstance(own, Reference)
        assert (own.nll, own.tokens) == (pytest.approx(ref.nll, rel=1e-12), ref.tokens)
        assert figures.mean_kl == pytest.approx(expected.mean_kl, rel=1e-12)
        assert figures.perplexity == pytest.approx(expected.perplexity, rel=1e-12)
        assert figures.token_agreement == expected.token_agreement
        assert (figures.max_kl, figures.kl_tokens) == (expected.max_kl, expected.kl_tokens)
    assert len(found[0][0].top) + len(found[1][0].top) == 8


def test_a_rank_without_a_batch_has_nothing_to_add(monkeypatch):
    monkeypatch.setattr(agreement, "scored_logits", lambda *_, **__: iter(()))
    world = SimpleNamespace(gather=lambda value: [value, [1.0]], size=2, rank=1)
    ref = reference(Model(1), ROWS, io.BytesIO(), world)
    assert (ref.nll, ref.top.tolist(), ref.top.dtype) == (1 / 8, [], torch.long)
