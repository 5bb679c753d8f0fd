"""Several ranks train like one process: each step's loss and gradients, and the adapter."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import quick
import torch
import yaml
from datasets import Dataset
from prepared import make_mixture_workspace, make_prepared_workspace
from safetensors.torch import load_file
from test_resume import set_params
from transformers import AutoTokenizer, TrainerCallback
from worlds import in_ranks

from stages.shared.params import Train, load_params
from stages.shared.rows import read_rows
from stages.training.dealing import Dealt, share, who_works, workers
from tests.tiny import PARAMS

pytestmark = pytest.mark.slow

# Relative to the norm of each gradient, and of the loss, since sums have another order.
ROUNDING = 1e-6


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    folder = make_prepared_workspace(tmp_path_factory.mktemp("ranks") / "ws")
    quick.run("quantize", folder)
    return folder


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    """The same of a mixture, whose experts are trained too."""
    folder = make_mixture_workspace(tmp_path_factory.mktemp("mixture") / "ws")
    quick.run("quantize", folder)
    return folder


def train_of(**changes) -> Train:
    return Train.model_validate(yaml.safe_load(PARAMS.read_text())["train"] | changes)


@pytest.mark.parametrize(
    ("batch", "accumulation", "available", "count", "at_once", "passes"),
    [
        (8, 1, 2, 2, 4, 1),
        (8, 2, 2, 2, 8, 1),
        (8, 2, 3, 2, 8, 1),
        (8, 3, 2, 2, 6, 2),
        (2, 3, 2, 2, 1, 3),
        (1, 1, 8, 1, 1, 1),
        (6, 1, 4, 3, 2, 1),
    ],
)
def test_a_step_is_dealt_evenly(batch, accumulation, available, count, at_once, passes):
    train = train_of(batch_size=batch, gradient_accumulation=accumulation)
    assert workers(train, available) == count
    own = share(train, count)
    assert (own.batch_size, own.gradient_accumulation) == (at_once, passes)
    assert share(train, 1) == train


def test_what_keeps_a_gpu_idle_is_said():
    train = train_of(batch_size=8, gradient_accumulation=2)
    assert who_works(train, 2) == "uses 2 GPUs, 8 rows of each step on each"
    assert who_works(train, 3) == (
        "uses 2 of 3 GPUs, 8 rows of each step on each: train.batch_size x "
        "train.gradient_accumulation is not divisible by 3; set train.gradient_accumulation: 3 "
        "to use all"
    )


class Seen(TrainerCallback):
    """Every step's loss, and the gradients with which the optimizer steps."""

    def __init__(self):
        self.losses, self.gradients = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.gradients.append({name: p.grad.clone() for name, p in trained})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


def train_a_little(world, folder: str, rows: int, fused: bool, changes: dict) -> tuple:
    """Train on the first `rows` rows; each step's loss and gradients, the adapter, the row order.

    The adapter's B are not zero: at zero most errors are invisible.
    """
    os.chdir(folder)
    from stages.shared.fast_path import FastPath
    from stages.shared.model import load_base
    from stages.shared.placement import Placement
    from stages.training.building import TrainingSet, build_trainer

    params = load_params()
    whole = params.train.model_copy(update=changes | {"max_grad_norm": 1.0, "epochs": 2.0})
    params = params.model_copy(update={"train": share(whole, world.size)})
    stored = read_rows(Path("data/prepared/train.arrow"))[:rows]
    data = TrainingSet(
        Dataset.from_dict({key: [r[key] for r in stored] for key in ("input_ids", "labels")}),
        AutoTokenizer.from_pretrained("data/prepared/tokenizer"),
        160,
    )
    model = load_base(Path("models/quantized"), torch.device("cpu"))
    fast = FastPath("sdpa", False, False, fused)
    kept = 0 if params.train.gradient_checkpointing else model.config.num_hidden_layers
    torch.manual_seed(0)
    trainer = build_trainer(model, data, params, fast, Placement(kept, kept), Path("unused"), world)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    seen, order = Seen(), []
    collate = trainer.data_collator

    def noting(examples):
        order.append([tuple(example["input_ids"]) for example in examples])
        return collate(examples)

    trainer.data_collator = noting
    trainer.add_callback(seen)
    trainer.train()
    state = trainer.model.state_dict()
    adapter = {name: value for name, value in state.items() if "lora_" in name}
    return seen.losses, seen.gradients, adapter, order, trainer.tokens


def assert_close(found: dict, expected: dict, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.any(), name
        assert (found[name] - tensor).norm() <= tolerance * tensor.norm(), name


# 45 rows and 8 a step: five in the last one; 41: a single row, and one rank without any.
CASES = {
    "grouped": (45, False, {"batching": "group_by_length"}),
    "fused": (45, True, {"batching": "group_by_length", "batch_size": 4}),
    "fused checkpointed": (41, True, {"batching": "shuffle", "gradient_checkpointing": True}),
    "packed": (48, False, {"batching": "packing", "batch_size": 2}),
    "packed, fused, checkpointed, in three passes": (
        48,
        True,
        {
            "batching": "packing",
            "batch_size": 2,
            "gradient_accumulation": 3,
            "gradient_checkpointing": True,
        },
    ),
    "checkpointed": (41, False, {"batching": "shuffle", "gradient_checkpointing": True}),
    "experts": (41, True, {"batching": "shuffle", "gradient_checkpointing": True}),
}


def train_all(world, dense: str, mixture: str) -> dict[str, tuple]:
    return {
        case: train_a_little(world, mixture if case == "experts" else dense, *what)
        for case, what in CASES.items()
    }


@pytest.fixture(scope="module")
def trained(quantized, mixture, tmp_path_factory) -> list[list[dict]]:
    """Every case by one process, and by two ranks."""
    folder = tmp_path_factory.mktemp("trained")
    return [in_ranks(n, folder / str(n), train_all, str(quantized), str(mixture)) for n in (1, 2)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_what_one_process_does(trained, case):
    (alone,), both = ([results[case] for results in ranks] for ranks in trained)
    assert any("experts" in name for name in alone[2]) == (case == "experts")
    assert len(alone[0]) >= 4
    for losses, gradients, adapter, _, _ in both:
        assert losses == pytest.approx(alone[0], rel=ROUNDING, abs=ROUNDING)
        assert len(gradients) == len(alone[1])
        # Later steps start from what Adam made of roundings: where a gradient is next to nothing
        # its sign decides.
        assert_close(gradients[0], alone[1][0], ROUNDING)
        assert_close(adapter, alone[2], 1e-4)
    # Bit-identical on both.
    for mine, others in zip(both[0][1], both[1][1], strict=True):
        assert all(torch.equal(mine[name], others[name]) for name in mine)
    assert all(torch.equal(both[0][2][name], both[1][2][name]) for name in alone[2])
    # Each row once an epoch on one of them, and every token counted.
    dealt = [row for order in (both[0][3], both[1][3]) for batch in order for row in batch]
    assert sorted(dealt) == sorted(row for batch in alone[3] for row in batch)
    assert both[0][4] + both[1][4] == alone[4]


def test_dropout_drops_other_values_on_each_rank(tmp_path):
    """The same mask on every rank would give correlated noise."""
    (first, a), (second, b) = in_ranks(2, tmp_path, drawn)
    assert torch.equal(first, second)
    assert not torch.equal(a, b)


def drawn(world):
    """The weights that a rank trains, which started different, and its next random numbers."""
    from stages.training.adjusting import train_together

    torch.manual_seed(world.rank)
    model = torch.nn.Linear(2, 2)
    torch.manual_seed(0)
    train_together(model, world, 0)
    return model.weight.detach(), torch.rand(4)


class Order(list):
    """A sampler."""


def test_every_rank_has_as_many_batches_as_the_others():
    lengths = [5, 9, 2, 7, 7, 1, 3, 8, 4, 6, 2]
    dealt = []
    for rank in range(3):
        args = SimpleNamespace(train_batch_size=2, gradient_accumulation_steps=1)
        world = SimpleNamespace(rank=rank, size=3, same=lambda order: order)
        state = SimpleNamespace(epoch=0.0)
        trainer = SimpleNamespace(args=args, world=world, rows_per_step=6, state=state)
        batches = Dealt(Order(range(11)), lengths, trainer)
        dealt.append(list(batches))
        assert len(dealt[-1]) == len(batches) == 2
    # Longest first in each step, in turn.
    assert dealt == [[[1, 0], [7, 6]], [[3, 2], [9, 10]], [[4, 5], [8]]]


@pytest.fixture(scope="module")
def alone(quantized, tmp_path_factory) -> Path:
    """The stage on one device."""
    folder = tmp_path_factory.mktemp("alone") / "ws"
    shutil.copytree(quantized, folder)
    quick.run("train", folder)
    return folder


@pytest.fixture(scope="module")
def together(quantized, tmp_path_factory) -> Path:
    """The stage on two ranks, as a person runs it: in processes of their own."""
    folder = tmp_path_factory.mktemp("together") / "ws"
    shutil.copytree(quantized, folder)
    done = subprocess.run(
        [sys.executable, "-m", "stages.train"],
        cwd=folder,
        env=os.environ | quick.ENVIRONMENT | {"CPU_RANKS": "2"},
        check=True,
        capture_output=True,
        text=True,
    )
    (folder / "train.log").write_text(done.stdout + done.stderr)
    return folder


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "models/adapter/adapter_model.safetensors")


def test_the_stage_on_two_ranks_trains_the_adapter_of_one(alone, together):
    assert_close(adapter_of(together), adapter_of(alone), 1e-4)
    one, two = (json.loads((f / "metrics/train.json").read_text()) for f in (alone, together))
    assert two == pytest.approx(one, rel=1e-5)
    others = {path.name for path in (alone / "models/adapter").iterdir()}
    assert {path.name for path in (together / "models/adapter").iterdir()} == others
    cost = json.loads((together / "metrics/train_cost.json").read_text())
    assert cost["ranks"] == 2
    peaks = [float(peak) for peak in cost["peak_ram_gb_by_rank"].split()]
    assert len(peaks) == 2
    assert max(peaks) == pytest.approx(cost["peak_ram_gb"])
    assert not list((together / "checkpoints").iterdir())


def test_the_stage_on_two_ranks_trains_the_experts_of_one(mixture, tmp_path):
    for ranks in ("1", "2"):
        shutil.copytree(mixture, tmp_path / ranks)
        said = quick.run("train", tmp_path / ranks, CPU_RANKS=ranks).said
        assert ("train: uses 2 ranks" in said) == (ranks == "2")
    one, two = (adapter_of(tmp_path / ranks) for ranks in ("1", "2"))
    assert sum("experts" in name for name in one) == 8
    assert_close(two, one, 1e-4)


def test_rank_0_speaks_for_all(together):
    said = (together / "train.log").read_text().splitlines()
    assert said[0] == "train: uses 2 ranks, 4 rows of each step on each"
    assert [line.split(":")[1].split(",")[0] for line in said[1:]] == [" 48 rows", " loss 5.3190"]


def test_the_curve_is_one(alone, together):
    curves = [(f / "metrics/curve.csv").read_text().splitlines() for f in (alone, together)]
    assert len(curves[0]) == len(curves[1])
    for one, two in zip(curves[0][1:], curves[1][1:], strict=True):
        values = [[float(v) for v in line.split(",") if v] for line in (one, two)]
        assert values[1] == pytest.approx(values[0], rel=1e-4)


def test_the_same_number_of_ranks_gives_the_same_bytes(quantized, together, tmp_path):
    folder = tmp_path / "ws"
    shutil.copytree(quantized, folder)
    quick.run("train", folder, CPU_RANKS="2")
    names = sorted(path.name for path in (together / "models/adapter").iterdir())
    for name in names:
        path = f"models/adapter/{name}"
        assert (folder / path).read_bytes() == (together / path).read_bytes(), name


def test_a_step_of_one_row_leaves_the_second_device_idle(quantized, tmp_path):
    folder = tmp_path / "ws"
    shutil.copytree(quantized, folder)
    set_params(folder, train={"batch_size": 1, "epochs": 0.1})
    stage = quick.run("train", folder, CPU_RANKS="2")
    assert "train: uses 1 of 2 ranks" in stage.said
    assert json.loads((folder / "metrics/train_cost.json").read_text())["ranks"] == 1


@pytest.mark.parametrize("stage", ["evaluate", "verify"])
def test_figures_of_two_ranks_are_those_of_one(alone, tmp_path, stage):
    """The batches are equal, and their order does not change a sum."""
    found = []
    if stage == "verify":
        shutil.copytree(alone, tmp_path / "merged")
        alone = tmp_path / "merged"
        quick.run("merge", alone)
    for ranks in ("1", "2"):
        folder = tmp_path / ranks
        shutil.copytree(alone, folder)
        fitting = folder / "stages/shared/fitting.py"
        code = fitting.read_text()
        fitting.write_text(code.replace("TOKENS_PER_BATCH = 4096", "TOKENS_PER_BATCH = 300"))
        said = quick.run(stage, folder, CPU_RANKS=ranks).said
        assert ("2 ranks" in said) == (ranks == "2")
        if stage == "evaluate":
            cost = json.loads((folder / "metrics/eval_cost.json").read_text())
            assert cost["ranks"] == int(ranks)
        files = (path for path in (folder / "metrics").iterdir() if "cost" not in path.name)
        found.append({path.name: path.read_bytes() for path in files})
    assert found[0] == found[1]
    assert len(found[0]) >= 2
