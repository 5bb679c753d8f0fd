"""What train takes for its budget, and what it does when the card or the machine has too little.

The card is a stand-in; tests/test_gpu_placement.py has a real one.
"""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

import stages.train
from benchmarks.random_models import config_of
from stages.shared import card as card_module
from stages.shared import placement
from stages.shared.card import card_budget
from stages.shared.outputs import GB
from stages.shared.placement import RATES, Placement
from stages.shared.process import StageError
from stages.shared.ranks import ALONE, host, lacks_gpu_memory, put
from stages.shared.watching import SIGNALED
from stages.shared.workload import KEPT, Lengths, shape_of
from stages.training import placing
from stages.training.dealing import share
from stages.training.placing import OUT_OF_MEMORY, TIGHTER, place, try_tighter
from tests.test_plan import params_of

CPU, GPU = torch.device("cpu"), SimpleNamespace(type="cuda")
ROWS = Lengths([2048] * 8, [2048] * 8, 2048)
HOST = 64 * GB


def forget_attempts(monkeypatch):
    """Before and after each test."""
    monkeypatch.setenv(TIGHTER, "0")
    monkeypatch.delenv(TIGHTER)


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A function that sets the free GB of the card, of the host, and what plan wrote as a limit."""
    monkeypatch.chdir(tmp_path)
    forget_attempts(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(placing, "measured_rates", lambda device: RATES)
    held = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", held.append)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)

    def have(free=80.0, host=HOST / GB, limit=None, planned=True):
        memory = int(free * GB), int(80 * GB)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: memory)
        monkeypatch.setattr(placing, "available_bytes", lambda: host * GB)
        card_module.PLAN.parent.mkdir(exist_ok=True)
        if planned:
            card_module.PLAN.write_text(json.dumps({"vram_limit_gb": limit}))
        return held

    return have


def mistral(checkpointing="auto", **train):
    params = params_of(train=train | {"gradient_checkpointing": checkpointing})
    return params, config_of("mistral-7b")


def test_the_limit_is_that_of_plan_json(card):
    held = card(free=80)
    whole = card_budget()
    assert 79 * GB < whole < 81 * GB
    card(free=80, limit=24)
    assert card_budget() == 24 * GB
    # A limit larger than the card changes nothing.
    card(free=12, limit=24)
    assert card_budget() < 12.5 * GB
    card(free=80, planned=False)
    card_module.PLAN.unlink()
    assert card_budget() == whole
    # The allocator gets the limit only if it is below the card's size.
    assert len(held) == 1
    assert 0 < held[0] < 24 / 80


@pytest.mark.parametrize("limit", [8, 12, 24, None])
def test_what_is_placed_fits_the_card_and_its_limit(card, capsys, limit):
    for free in (8, 20, 80):
        card(free=free, limit=limit)
        placed = place(*mistral(batch_size=2), ROWS, GPU)
        assert placed.budget <= min(free + 1, limit or free + 1) * GB
        assert placed.prediction.device <= placed.budget
        said = capsys.readouterr().out
        assert f"{placed.prediction.device / GB:.2f} GB of the card predicted" in said
        assert ("streamed from host memory" in said) == bool(placed.placement.streamed)
        recorded = placed.metrics(fused=True)
        assert recorded["streamed_layers"] == placed.placement.streamed
        assert recorded["predicted_device_gb"] == placed.prediction.device / GB


def test_what_is_left_of_the_card_keeps_weights_in_16_bit(card, capsys):
    params, config = mistral(batch_size=2)
    config.quantization_config = {"bnb_4bit_use_double_quant": True}
    found = []
    for free, leave in ((80, 0.0), (28, 0.0), (28, 0.1), (8, 0.0)):
        card(free=free)
        placed = place(params, config, ROWS, GPU, leave=leave)
        assert placed.prediction.device <= placed.budget
        dense = placed.placement.dense
        said = f"weights on the GPU, those of {dense} of 32 layers in 16 bit; nothing"
        assert (said in capsys.readouterr().out) == bool(dense)
        assert placed.metrics(fused=True)["dense_layers"] == dense
        # The trial has rejected what reads them.
        assert placed.metrics(fused=False)["dense_layers"] == 0
        found.append(dense)
    whole, some, after_a_lack, none = found
    assert whole == 32 > some > after_a_lack > none == 0


@pytest.mark.parametrize(("checkpointing", "kept"), [("auto", 32), (False, 32), (True, 0)])
def test_on_the_cpu_auto_recomputes_nothing(checkpointing, kept):
    placed = place(*mistral(checkpointing), ROWS, CPU)
    assert placed.placement == Placement(kept, kept)
    # There is no card to say anything of.
    assert placed.metrics(fused=True) == {}


@pytest.mark.parametrize("checkpointing", [True, False])
def test_what_was_asked_for_is_kept(card, checkpointing):
    card(free=80)
    placed = place(*mistral(checkpointing), ROWS, GPU).placement
    layers = 0 if checkpointing else 32
    assert (placed.kept_mlp, placed.kept_attention) == (layers, layers)


def test_too_little_host_memory_is_refused_in_a_line(card):
    card(free=8, host=64)
    placed = place(*mistral(batch_size=2), ROWS, GPU)
    assert not placed.ring
    needed = placing.ring_bytes(sizes_of_run(*mistral(batch_size=2)), placed.placement)
    card(free=8, host=0.5)
    with pytest.raises(StageError) as refused:
        place(*mistral(batch_size=2), ROWS, GPU)
    line = str(refused.value)
    assert "GB of host memory, but only 0.5 GB are free" in line
    assert f"needs {needed / GB:.1f} GB" in line
    assert "\n" not in line


def test_without_room_for_a_copy_weights_are_read_from_their_files(card, capsys):
    card(free=8, host=64)
    placed = place(*mistral(batch_size=2), ROWS, GPU)
    sizes = sizes_of_run(*mistral(batch_size=2))
    assert "read from their files" not in capsys.readouterr().out
    card(free=8, host=(placing.ring_bytes(sizes, placed.placement) - placement.PROCESS) / GB + 0.1)
    again = place(*mistral(batch_size=2), ROWS, GPU)
    assert again.ring
    assert again.placement == placed.placement
    assert "read from their files" in capsys.readouterr().out


def test_a_card_that_is_too_small_is_tried_all_the_same(card):
    """The prediction may be wrong; running out of memory is explained."""
    card(free=3)
    placed = place(*mistral(batch_size=4), ROWS, GPU)
    assert placed.prediction.device > placed.budget
    assert placed.placement.streamed == 32


def test_a_faster_split_of_the_batch_is_said(card, capsys):
    card(free=24)
    params, config = mistral(batch_size=8)
    place(params, config, ROWS, GPU)
    said = [line for line in capsys.readouterr().out.splitlines() if "would be about" in line]
    assert len(said) == 1
    words = said[0].split()
    size, times = (
        int(words[words.index(name) + 1]) for name in ("batch_size", "gradient_accumulation")
    )
    assert size * times == 8
    gain = int(words[words.index("about") + 1])
    # After following the advice, there is none.
    train = params.train.model_copy(update={"batch_size": size, "gradient_accumulation": times})
    changed = params.model_copy(update={"train": train})
    taken = place(changed, config, ROWS, GPU)
    assert "would be about" not in capsys.readouterr().out
    before = step_seconds(params, config, place(params, config, ROWS, GPU).placement)
    after = times * step_seconds(changed, config, taken.placement)
    assert 100 * (before / after - 1) == pytest.approx(gain, abs=0.6)


def test_a_faster_split_is_said_for_the_rows_of_all_gpus(card, capsys):
    card(free=24)
    params, config = mistral(batch_size=16)
    one = params.model_copy(update={"train": share(params.train, 2)})
    world = SimpleNamespace(size=2, gather=lambda x: [x, x], same=lambda x: x)
    place(one, config, ROWS, GPU, world)
    said = next(x for x in capsys.readouterr().out.splitlines() if "would be about" in x).split()
    size, times = (
        int(said[said.index(name) + 1]) for name in ("batch_size", "gradient_accumulation")
    )
    assert size * times == 16


def sizes_of_run(params, config):
    return placing.run_sizes(config, shape_of(config), params, ROWS)


def step_seconds(params, config, placed):
    return placement.seconds(sizes_of_run(params, config), placed, RATES)


def test_a_lack_of_memory_is_answered_once(card, monkeypatch, capsys):
    started = []
    monkeypatch.setattr("os.execv", lambda *command: started.append(command))
    card(free=24)
    first = place(*mistral(batch_size=2), ROWS, GPU, leave=placing.tighter())
    try_tighter()
    assert started == [(sys.executable, [sys.executable, "-m", "stages.train"])]
    assert "retrying" in capsys.readouterr().out
    # As the new process starts.
    second = place(*mistral(batch_size=2), ROWS, GPU, leave=placing.tighter())
    assert second.prediction.device < first.prediction.device
    assert second.budget == pytest.approx(0.9 * first.budget)
    try_tighter()
    assert len(started) == 1


def test_every_setting_has_its_placement():
    assert set(KEPT) == {"auto", True, False}
    assert len(set(KEPT.values())) == 3


@pytest.mark.parametrize(("machines", "signaled"), [(1, False), (2, False), (1, True)])
def test_ranks_that_lack_memory_are_started_again_once(machines, signaled, monkeypatch, tmp_path):
    """By the stage. On several machines the others would not hear of it, and after a signal the
    run is to end."""
    forget_attempts(monkeypatch)
    started, params = [], params_of(train={"batch_size": 4})
    monkeypatch.setattr("os.execv", lambda *command: started.append(command))
    monkeypatch.setattr(stages.train, "how_many", lambda: machines)
    monkeypatch.setattr(stages.train, "wait_for", lambda *_: (host(), {}))

    def run_ranks(stage, function, devices, store, **_):
        put(store, OUT_OF_MEMORY, True)
        if signaled:
            put(store, SIGNALED, True)
        raise StageError("out of GPU memory")

    monkeypatch.setattr(stages.train, "run_ranks", run_ranks)
    for _ in range(2):
        with pytest.raises(StageError, match="out of GPU memory"):
            stages.train.train_on(["0", "1"], params, tmp_path)
        assert len(started) == (machines == 1 and not signaled)


@pytest.mark.parametrize("name", ["MACHINES", "WORLD_SIZE"])
def test_started_again_a_stage_does_not_wait_for_machines_that_it_did_not_need(
    monkeypatch, tmp_path, name
):
    """They have ended by then."""
    monkeypatch.delenv("MACHINES", raising=False)
    monkeypatch.setenv(name, "2")
    monkeypatch.setattr(stages.train, "wait_for", lambda *_: (host(), {1: 1}))
    monkeypatch.setattr(stages.train, "train", lambda *_: stages.train.how_many())
    one_row = params_of(train={"batch_size": 1, "gradient_accumulation": 1})
    assert stages.train.train_on([""], one_row, tmp_path) == 1


def nccl(last):
    return torch.distributed.DistBackendError(f"NCCL error in: file.cpp:1\nLast error:\n{last}")


@pytest.mark.parametrize(
    ("error", "lacking"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory."), True),
        (
            torch.distributed.DistBackendError(
                "NCCL error\nLast error:\nCuda failure 2 'out of memory'"
            ),
            True,
        ),
        (
            torch.distributed.DistBackendError(
                "NCCL error\nLast error:\nFailed to CUDA calloc 608 bytes"
            ),
            True,
        ),
        (nccl("socketStartConnect: Connect to 10.0.0.5 failed"), False),
        (RuntimeError("the string 'out of memory' in some other error"), False),
    ],
)
def test_nccl_runs_out_of_memory_too(error, lacking):
    assert lacks_gpu_memory(error) == lacking


def test_buckets_of_several_gpus_are_counted(card, monkeypatch):
    card(free=24)
    world = SimpleNamespace(size=2, gather=lambda x: [x, x], same=lambda x: x)
    alone, ranked = (place(*mistral(), ROWS, GPU, at) for at in (ALONE, world))
    gradients = sizes_of_run(*mistral()).gradients
    assert ranked.placement == alone.placement
    added = ranked.prediction.peak - alone.prediction.peak
    assert added == pytest.approx(gradients, rel=0.02)
