"""The benchmark of methods and strategies on a tiny shape, without a GPU."""

import os

import pytest
import torch
from prepared import make_prepared_workspace

from benchmarks import fast_path, methods, vram
from benchmarks.speed import random_rows

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


# What benchmarks.vram.peaks gives, without a GPU.
PEAKS = {"measured_gb": 1.0, "measured_device_gb": 2.0, "managed_gb": 0.0}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    def tiny_rows(count):
        return [[token % 260 for token in row] for row in random_rows(count)]

    monkeypatch.setattr(methods, "SHAPE", "tiny")
    monkeypatch.setattr(methods, "peaks", lambda trainer: PEAKS)
    monkeypatch.setattr(methods, "random_rows", tiny_rows)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.mark.parametrize("name", [methods.EVERYTHING, "16-bit base", "rows not packed"])
def test_a_strategy_trains_its_steps(monkeypatch, name):
    monkeypatch.setattr(methods, "STRATEGY_ROWS", 60)
    monkeypatch.setattr(methods, "STRATEGY_STEPS", 4)
    monkeypatch.setattr(methods, "STRATEGY_WARM", 1)
    found = methods.measure_strategy(name, CPU)
    assert found["steps"] == 4
    assert found["tokens_per_step"] > 0
    if name != "rows not packed":
        assert found["tokens_per_step"] == pytest.approx(2 * 2048, rel=0.2)


def test_a_method_begins_with_the_longest_rows(monkeypatch):
    monkeypatch.setattr(methods, "STEPS", 3)
    monkeypatch.setattr(methods, "WARM_STEPS", 2)
    found = methods.measure_method("lora", CPU)
    lengths = sorted(methods.row_lengths(methods.ROWS))
    assert found["longest_step_tokens"] == sum(lengths[-4:])
    assert found["seconds_per_epoch"] > 0


def test_longest_rows_come_first_and_none_twice():
    rows = [[1], [2] * 5, [3] * 2, [4] * 5, [5] * 3]
    assert methods.longest_first(rows, 2, 2) == [rows[1], rows[3], rows[0], rows[2]]


def test_what_runs_alone_leaves_nothing_behind():
    assert vram.alone(os.getpid) != vram.alone(os.getpid) != os.getpid()
    with pytest.raises(ValueError, match="neither"):
        vram.alone(int, "neither")


@pytest.mark.parametrize("name", [methods.EVERYTHING, "16-bit base"])
def test_perplexity_is_that_of_the_trained_adapter(tmp_path, name):
    project = make_prepared_workspace(tmp_path)
    found = methods.measure_perplexity(name, project, CPU)
    assert found["steps"] > 1
    assert 1 < found["perplexity"] < 260


def test_tables_name_every_strategy(tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "RESULTS", tmp_path / "methods.json")
    row = PEAKS | {"tokens_per_second": 5.0, "seconds_per_step": 0.1}
    methods.keep("strategies", [row | {"strategy": name} for name in methods.STRATEGIES], "CPU")
    methods.keep("perplexity", [{"strategy": methods.EVERYTHING, "perplexity": 9.5}] * 2, "CPU")
    text = methods.markdown(methods.json.loads(methods.RESULTS.read_text()))
    assert all(f"| {name} |" in text for name in methods.STRATEGIES)
    assert "9.50 and 9.50" in text


def test_the_curve_and_the_evaluation_have_their_sides(tmp_path, monkeypatch):
    monkeypatch.setattr(fast_path, "STEPS", 4)
    # A separate process would not know about the four steps.
    monkeypatch.setattr(fast_path, "alone", lambda function, *args: function(*args))
    found = fast_path.curve(make_prepared_workspace(tmp_path), CPU)
    assert found["steps"] == 4
    # Without a GPU, all sides use the plain path.
    assert found["from_plain"]["largest_nats"] == found["from_itself"]["largest_nats"] == 0
    monkeypatch.setattr(fast_path, "EVALUATED_ROWS", 6)
    monkeypatch.setattr(fast_path, "SHAPE", "tiny")
    monkeypatch.setattr(fast_path, "random_rows", methods.random_rows)
    found = fast_path.evaluation(CPU)
    assert found["stage"]["nll"] == pytest.approx(found["plain loop"]["nll"], rel=1e-4)
