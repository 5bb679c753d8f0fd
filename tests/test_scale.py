"""The benchmarks of ranks, host copies and the longest row, without a GPU."""

import json
import subprocess
from types import SimpleNamespace

import pytest

from benchmarks import figures, random_models, scale, speed, step_profile
from stages.shared import layer_sources
from stages.shared.host_memory import shared_buffer


class Pipe:
    def send(self, value):
        self.sent = value

    def recv(self):
        pass


def used(path):
    # As in a process of its own, which draws the same numbers.
    random_models._host_codes.cache_clear()
    pipe = Pipe()
    scale.use_copy("tiny", path, pipe)
    return pipe.sent


def test_logits_are_those_of_the_mapped_copy(monkeypatch):
    # use_copy itself replaces it, for good.
    monkeypatch.setattr(layer_sources, "lock", lambda buffer: None)
    first = used(None)
    second = used(first["path"])
    assert second["logits"] == first["logits"]
    assert second["path"] == first["path"]
    _, zeros = shared_buffer(round(first["copy_gb"] * 1e9))
    assert used(zeros)["logits"] != first["logits"]


def run(way, steady, adapter):
    rates = {"steady_tokens_per_second": steady, "tokens_per_second": steady / 2}
    return {"way": way, "adapter_sha256": adapter} | rates


@pytest.mark.parametrize("last", ["a", "b"])
def test_a_rank_is_compared_with_the_process(last):
    runs = [run("process", 100, "a"), run("rank", 98, "a"), run("process", 110, "a")]
    found = scale.of_one([*runs, run("rank", 112, last)])
    assert found["one_steady_ratio"] == found["one_epoch_ratio"] == 1
    assert found["one_same_bytes"] == (last == "a")


def tried(monkeypatch, tmp_path, limits):
    """The `longest` of RESULTS, where a side trains rows up to its limit."""

    def attempt(command, **_):
        side, tokens = command[-2], int(command[-1])
        if tokens > limits[side]:
            error = "torch.OutOfMemoryError: CUDA out of memory."
            return subprocess.CompletedProcess(command, 1, "", error)
        row = {"side": side, "peak_vram_gb": 1.0, "steady_tokens_per_second": 2.0, "date": "today"}
        return subprocess.CompletedProcess(command, 0, json.dumps(row) + "\n", "")

    file = tmp_path / "results/speed.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"sides": {}}))
    monkeypatch.setattr(speed, "RESULTS", file)
    monkeypatch.setattr(speed, "planned_row", lambda: 0)
    monkeypatch.setattr(speed.subprocess, "run", attempt)
    for side in limits:
        speed.longest(tmp_path, side, [6000, 2000, 4000, 8000])
    return json.loads(file.read_text())


def test_lengths_are_tried_up_to_the_first_that_does_not_fit(monkeypatch, tmp_path, capsys):
    results = tried(monkeypatch, tmp_path, {"ours": 6500, "unsloth": 3000})
    assert results["sides"] == {}
    found = results["longest"]
    assert [found["ours"][k] for k in ("longest_trained", "out_of_memory")] == [6000, 8000]
    assert [one["tokens"] for one in found["unsloth"]["attempts"]] == [2000, 4000]
    monkeypatch.setattr(figures, "results", lambda name: results)
    capsys.readouterr()
    figures.longest_row()
    ours, theirs = capsys.readouterr().out.splitlines()
    assert "one row of 6,000 tokens" in ours
    assert "8,000 run out of memory" in ours
    assert "one row of 2,000 tokens" in theirs
    assert "4,000 run out of memory" in theirs


def test_an_attempt_may_have_no_result(monkeypatch, tmp_path):
    def too_slow(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(speed.subprocess, "run", too_slow)
    found = speed.compared([speed.attempt(tmp_path, "unsloth", 2000)])
    assert found["attempts"][0]["result"] == "no result"
    assert found["longest_trained"] is found["out_of_memory"] is None


def test_nothing_is_said_of_parts_without_results(monkeypatch, capsys):
    monkeypatch.setattr(figures, "results", lambda name: {"longest": {"ours": {}}})
    figures.one_rank()
    figures.longest_row()
    assert capsys.readouterr().out == ""


def test_kernels_are_grouped_once():
    """Products by the shapes of their factors, other kernels by name, annotations not at all."""

    def event(key, ms, shapes=(), device="CUDA", note=False):
        return SimpleNamespace(
            key=key,
            self_device_time_total=1000 * ms,
            input_shapes=shapes,
            device_type=SimpleNamespace(name=device),
            is_user_annotation=note,
        )

    events = [
        event("aten::mm", 5, [[64, 4096], [4096, 4096]], "CPU"),
        event("aten::mm", 2, [[64, 4096], [4096, 48]], "CPU"),
        event("nvjet", 7),
        event("flash_fwd", 3),
        event("_dequantize", 1),
        event("Memcpy HtoD", 4),
        event("norm", 6),
        event("Optimizer.step", 9, note=True),
        event("aten::add", 0, [[64]], "CPU"),
    ]
    found = step_profile.grouped(events, rank=16)
    assert found == pytest.approx(
        {
            "base products": 0.005,
            "adapter products": 0.002,
            "attention": 0.003,
            "dequantization": 0.001,
            "copies": 0.004,
            "other kernels": 0.006,
        }
    )


def test_other_bytes_are_not_concealed(monkeypatch, capsys):
    where = {"device": "GPU", "date": "2026-11-30"}
    runs = [run("process", 100, "a"), run("rank", 99, "b"), run("process", 100, "a")]
    found = scale.of_one(runs) | {"one": runs, "one_run": where, "one_shape": "tiny"}
    monkeypatch.setattr(figures, "results", lambda name: found)
    figures.one_rank()
    said = capsys.readouterr().out
    assert "99.0 %" in said
    assert "**other** bytes" in said
    assert "Two processes" not in said
