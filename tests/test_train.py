"""What training must not change, what it must change, and what it writes."""

import hashlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import trl.trainer.utils
import yaml
from datasets import Dataset
from peft import PeftModel
from prepared import make_prepared_workspace
from quick import Stage, run
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerControl, TrainerState

from stages.shared.adapter_record import adapter_record
from stages.shared.fast_path import choose_fast_path
from stages.shared.model import load_base
from stages.shared.params import Params
from stages.shared.process import sha256
from stages.shared.ranks import ALONE
from stages.shared.rows import read_rows
from stages.shared.scoring import TOKENS_PER_BATCH, Scores, score
from stages.shared.workload import Lengths
from stages.training import progress
from stages.training.building import TrainingSet, build_trainer, largest_pass
from stages.training.placing import place
from stages.training.probe import Probe, needs_probe
from tests.tiny import make_model

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    folder = make_prepared_workspace(tmp_path_factory.mktemp("train"), lora={"dropout": 0.1})
    run("quantize", folder)
    return folder


@pytest.fixture
def project(quantized, tmp_path):
    """A workspace of the test's own in which train can start."""
    folder = tmp_path / "ws"
    shutil.copytree(quantized, folder)
    return folder


def train(folder, **sections):
    """Run the stage with changed parameters; returns the adapter's tensors."""
    params = yaml.safe_load((folder / "params.yaml").read_text())
    for section, values in sections.items():
        params[section] |= values
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    run("train", folder)
    return load_file(folder / "models/adapter/adapter_model.safetensors")


def test_the_base_stays_and_every_adapter_tensor_moves(project):
    before = {p.name: sha256(p) for p in (project / "models/quantized").iterdir()}
    adapter = train(project)
    assert {p.name: sha256(p) for p in (project / "models/quantized").iterdir()} == before
    assert len(adapter) == 2 * 7 * 2
    for name, tensor in adapter.items():
        # trl would have made them bfloat16, and a resumed run float32 again.
        assert tensor.dtype == torch.float32, name
        assert tensor.any(), name
    moved = train(project, train={"learning_rate": 1e-3})
    assert all(not torch.equal(adapter[name], moved[name]) for name in adapter)


def test_two_runs_on_as_many_threads_write_the_same_bytes(project):
    sums, tensors = {1: [], 2: []}, {}
    for threads in (1, 2, 2, 1):
        run("train", project, OMP_NUM_THREADS=str(threads))
        files = sorted((project / "models/adapter").iterdir())
        sums[threads].append({path.name: sha256(path) for path in files})
        tensors[threads] = load_file(project / "models/adapter/adapter_model.safetensors")
        assert json.loads((project / "metrics/train_cost.json").read_text())["threads"] == threads
    for first, second in sums.values():
        assert first == second
    # Sums in another order may be rounded differently.
    for name, tensor in tensors[1].items():
        assert torch.allclose(tensor, tensors[2][name], atol=1e-4), name
    config = json.loads((project / "models/adapter/adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["base_model_name_or_path"] == "models/base"
    digest = sha256(project / "models/base/model.safetensors")
    assert config["revision"] == "sha256:" + hashlib.sha256(f"{digest}\n".encode()).hexdigest()


def test_metrics_and_curve(project):
    train(project)
    metrics = json.loads((project / "metrics/train.json").read_text())
    rows = read_rows(project / "data/prepared/train.arrow")
    assert metrics["steps"] == len(rows) // 8
    assert metrics["tokens"] == sum(len(row["input_ids"]) for row in rows)
    adapter = load_file(project / "models/adapter/adapter_model.safetensors")
    assert metrics["trainable_params"] == sum(t.numel() for t in adapter.values())
    lines = (project / "metrics/curve.csv").read_text().splitlines()
    header = lines[0].split(",")
    assert len(lines) == 1 + metrics["steps"]
    last = dict(zip(header, lines[-1].split(","), strict=True))
    # The held-out loss of the last step is that of the saved adapter, by the same scores.
    model = PeftModel.from_pretrained(
        load_base(project / "models/quantized", CPU), project / "models/adapter"
    )
    scores = score(model, read_rows(project / "data/prepared/eval.arrow"))
    assert float(last["eval_loss"]) == pytest.approx(sum(scores.nll) / sum(scores.tokens), rel=1e-4)
    cost = json.loads((project / "metrics/train_cost.json").read_text())
    assert cost["train_seconds"] > 0
    assert "peak_vram_gb" not in cost
    recorded = {"adapter_config_sha256", "adapter_sha256"}
    assert {key: cost[key] for key in recorded} == adapter_record(project / "models/adapter")


def test_tokens_of_part_of_an_epoch_are_those_of_its_steps(project):
    train(project, train={"epochs": 0.4})
    metrics = json.loads((project / "metrics/train.json").read_text())
    # Steps are whole: three of the epoch's six.
    assert metrics["steps"] == 3
    lengths = sorted(len(r["input_ids"]) for r in read_rows(project / "data/prepared/train.arrow"))
    assert sum(lengths[:24]) <= metrics["tokens"] <= sum(lengths[24:])
    assert metrics["tokens"] != round(0.4 * sum(lengths))


def test_checkpointing_changes_nothing_but_memory(project):
    plain = train(project, lora={"dropout": 0.0})
    checkpointed = train(project, train={"gradient_checkpointing": True})
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        assert torch.allclose(plain[name], checkpointed[name], atol=1e-6), name


def test_packed_rows_do_not_see_each_other(project):
    """One step on packed rows equals one step on separate rows: a leak would change it."""
    one_step = {"schedule": "constant", "warmup_ratio": 0.0, "gradient_checkpointing": False}
    apart = train(
        project,
        lora={"dropout": 0.0},
        train=one_step | {"batching": "shuffle", "batch_size": 48},
    )
    together = train(project, train={"batching": "packing"})
    assert json.loads((project / "metrics/train.json").read_text())["steps"] == 1
    assert apart.keys() == together.keys()
    # Adam's first step is lr times the sign of the gradient: equal but where it is next to zero.
    share = [
        ((apart[n] - together[n]).abs() < 1e-4).float().mean().item() for n in apart if "_B" in n
    ]
    assert min(share) > 0.98


def test_lora_on_the_16_bit_base(project):
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["quantize"]["type"] = "none"
    params["train"] |= {"batching": "group_by_length", "batch_size": 8}
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    run("quantize", project)
    adapter = train(project)
    assert len(adapter) == 2 * 7 * 2
    assert all(tensor.any() for tensor in adapter.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation": 2, "gradient_checkpointing": False},
        {"gradient_accumulation": 1, "gradient_checkpointing": True},
    ],
    ids=["accumulating", "checkpointing"],
)
def test_a_probe_of_the_longest_batch_changes_no_byte(project, tmp_path, changes):
    raw = yaml.safe_load((project / "params.yaml").read_text())
    # With dropout a random state that is not put back shows in every gradient.
    raw["lora"]["dropout"] = 0.1
    raw["train"] |= changes | {"batch_size": 8, "batching": "shuffle"}
    params = Params.model_validate(raw)
    stored = read_rows(project / "data/prepared/train.arrow")
    rows = Dataset.from_dict({key: [r[key] for r in stored] for key in ("input_ids", "labels")})
    tokenizer = AutoTokenizer.from_pretrained(project / "data/prepared/tokenizer")
    assert needs_probe(rows)
    adapters, tokens, tried = [], [], []
    for probed in (False, True):
        model = load_base(project / "models/quantized", CPU)
        fast = choose_fast_path(params, model.config, gpu=False)
        # On the CPU, lengths have no effect.
        placed = place(params, model.config, Lengths([], [], 160), CPU).placement
        torch.manual_seed(0)
        data = TrainingSet(rows, tokenizer, 160)
        trainer = build_trainer(model, data, params, fast, placed, tmp_path)
        if probed:
            collate = trainer.data_collator

            def watching(examples, collate=collate):
                tried.append([len(example["input_ids"]) for example in examples])
                return collate(examples)

            trainer.data_collator = watching
            trainer.add_callback(Probe(trainer))
        trainer.train()
        tokens.append(trainer.tokens)
        state = trainer.model.state_dict()
        adapters.append({name: value for name, value in state.items() if "lora_" in name})
    lengths = sorted(map(len, trainer.train_dataset["input_ids"]), reverse=True)
    # What a data loader asks for may come ahead of what the probe asks for.
    assert lengths[:8] in tried
    assert tokens[0] == tokens[1]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        assert torch.equal(tensor, adapters[1][name]), name


@pytest.mark.parametrize(("last", "needed"), [(60, False), (100, False), (1, True)])
def test_only_steps_that_can_grow_are_tried(last, needed):
    rows = [[5] * 100] * 9 + [[5] * last]
    assert needs_probe(Dataset.from_dict({"input_ids": rows, "labels": rows})) == needed


@pytest.mark.parametrize(("padding_free", "tokens"), [(True, 9 + 7), (False, 2 * 9)])
def test_the_largest_pass_has_the_longest_rows(padding_free, tokens):
    rows = [[5] * length for length in (3, 9, 1, 7)]
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    assert largest_pass(data, 2, padding_free) == tokens
    assert largest_pass(data, 9, True) == 20


def outputs(folder):
    files = [*(folder / "models/adapter").rglob("*"), *(folder / "metrics").glob("*")]
    return {str(file): file.read_bytes() for file in files}


RUNS_OUT = """
import torch


def _run_out(*args, **kwargs):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


"""


@pytest.mark.parametrize(
    ("module", "fault", "batch_size", "remedy"),
    [
        ("training/trainer", "Trainer.training_step", 4, "lower train.batch_size (now 4)"),
        ("training/trainer", "Trainer.training_step", 1, "set train.gradient_checkpointing: auto"),
        ("training/building", "build_trainer", 4, "lower train.batch_size (now 4)"),
        ("shared/model", "load_base", 1, "use a smaller base"),
    ],
)
def test_running_out_of_memory_is_one_line(project, module, fault, batch_size, remedy):
    train(project, train={"batch_size": batch_size, "gradient_checkpointing": False})
    plan = {"predicted_peak_vram_gb": 7.25, "predicted_device_gb": 8.5}
    (project / "metrics/plan.json").write_text(json.dumps(plan))
    before = outputs(project)
    with (project / f"stages/{module}.py").open("a") as code:
        code.write(RUNS_OUT + f"{fault} = _run_out\n")
    stage = Stage("train", project)
    assert stage.wait() == 1
    lines = [line for line in stage.said.splitlines() if "out of GPU memory" in line]
    assert lines == stage.said.splitlines()[-1:]
    begins = {
        "load_base": " while the base model was loaded",
        "build_trainer": " with 0.00 GB allocated (",
    }.get(fault, " with 0.00 GB allocated (adapter 0.00")
    assert lines[0].startswith(f"train: out of GPU memory{begins}")
    assert "plan predicted 7.25 GB, and 8.50 GB with CUDA's own" in lines[0]
    assert remedy in lines[0]
    assert outputs(project) == before


def test_only_learned_positions_are_scored(tmp_path, monkeypatch):
    """stages/training/trainer.py asks trl for it; on a CPU trl would score them all."""
    model = make_model(tmp_path).float()
    trl.trainer.utils.add_fused_lm_head(model)
    head = trl.trainer.utils._ChunkedLogProbFunction
    scored, apply = [], head.apply

    def counting(hidden, *rest):
        scored.append(len(hidden))
        return apply(hidden, *rest)

    monkeypatch.setattr(head, "apply", counting)
    ids = torch.arange(3, 3 + 24).view(2, 12)
    labels = ids.where(ids % 12 > 7, torch.tensor(-100))
    output = model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert scored == [int((labels[:, 1:] >= 0).sum())]
    expected = model(input_ids=ids, labels=labels).loss.item()
    assert -output.log_probs.sum().item() / scored[0] == pytest.approx(expected, rel=1e-5)


def test_held_out_rows_are_scored_in_the_memory_of_a_step():
    asked = []

    def scored(rows, tokens_per_batch):
        asked.append(tokens_per_batch)
        return Scores([1.0], [1])

    for step_tokens in (100, 2 * TOKENS_PER_BATCH):
        trainer = SimpleNamespace(tokens=0, world=ALONE, score=scored)
        callback = progress.Progress(trainer, [], step_tokens, SimpleNamespace(took=0.0))
        state = TrainerState(global_step=4, max_steps=4)
        callback.on_train_begin(None, state, None)
        model = SimpleNamespace(device=CPU)
        callback.on_step_end(None, state, TrainerControl(), model=model)
        callback.on_train_end(None, state, None)
    assert asked == [100, TOKENS_PER_BATCH]
