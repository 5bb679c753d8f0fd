"""The plan stage: what it accepts, refuses, writes and advises."""

import json

import pyarrow as pa
import pytest
import yaml
from transformers import AutoConfig

from stages import plan
from stages.planning import workload
from stages.planning.token_ids import check_token_ids
from stages.planning.workload import Lengths, match_targets, planned_training, read_model
from stages.shared import vram
from stages.shared.outputs import write_sums
from stages.shared.params import Params
from stages.shared.process import StageError
from stages.shared.rows import SCHEMA
from tests.tiny import PARAMS, make_model, make_tokenizer


def params_of(**sections) -> Params:
    raw = yaml.safe_load(PARAMS.read_text())
    for section, values in sections.items():
        raw[section] |= values
    return Params.model_validate(raw)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A models/tokenizer with the config of a tiny Llama."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_model(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tokenizer):
    return read_model(tokenizer)


MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    """The shape of Mistral-7B: no weights are needed to plan for it."""
    folder = tmp_path_factory.mktemp("mistral")
    (folder / "config.json").write_text(json.dumps(MISTRAL))
    return read_model(folder)


ROWS = Lengths(tokens=[100, 2000, 300, 1500], learned=[50, 1000, 100, 20], max_length=2048)


def write_rows(prepared, rows, chunk=None):
    prepared.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(
        [
            {"row": f"rows.jsonl:{i}", "input_ids": ids, "labels": labels, "prompt_tokens": 1}
            | {"scored_bytes": 1}
            for i, (ids, labels) in enumerate(rows)
        ],
        schema=SCHEMA,
    )
    with (
        pa.OSFile(str(prepared / "train.arrow"), "wb") as file,
        pa.ipc.new_stream(file, SCHEMA) as out,
    ):
        out.write_table(table, max_chunksize=chunk)
    (prepared / "prepared.json").write_text(json.dumps({"max_length": 64}))


def test_lengths_are_read_with_the_learned_tokens(tmp_path):
    prepared = tmp_path / "prepared"
    write_rows(prepared, [([1, 2, 3], [-100, 2, 3]), ([4] * 9, [-100] * 9), ([5], [5])])
    assert workload.read_lengths(prepared) == Lengths([3, 9, 1], [2, 0, 1], 64)


@pytest.mark.parametrize(
    ("train", "padding_free", "expected"),
    [
        ({"batching": "shuffle", "batch_size": 2}, False, (2, 4000, 1100)),
        ({"batching": "group_by_length", "batch_size": 2}, True, (1, 3500, 1100)),
        ({"batching": "shuffle", "batch_size": 99}, False, (4, 8000, 1170)),
        ({"batching": "packing", "batch_size": 1}, True, (1, 2048, 1170)),
        ({"batching": "packing", "batch_size": 8}, True, (1, 3900, 1170)),
    ],
)
def test_the_largest_step(train, padding_free, expected):
    assert workload.largest_step(ROWS, params_of(train=train).train, padding_free) == expected


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "v_porj"], "v_porj is no linear layer of the base.*did you mean v_proj"),
        (["lm_head"], "lm_head is no linear layer"),
        (["embed_tokens"], "embed_tokens is no linear layer"),
        (["self_attn"], "self_attn is no linear layer"),
        (["proj"], "proj is no linear layer.*It has down_proj, gate_proj"),
    ],
)
def test_a_target_that_peft_would_skip_is_refused(tiny, targets, message):
    with pytest.raises(StageError, match=message) as refused:
        match_targets(tiny[1], targets)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "no-such-model"}, "not a decoder that plan knows"),
        ({"model_type": "gpt2"}, "not a decoder that plan knows"),
        (MISTRAL | {"model_type": "mixtral"}, "mixtures of experts cannot be merged"),
        (MISTRAL | {"model_type": "qwen3_moe"}, "mixtures of experts cannot be merged"),
        ({}, "not a decoder that plan knows"),
    ],
)
def test_a_model_that_it_does_not_know_is_refused_in_one_line(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StageError, match=message) as refused:
        read_model(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_limit_that_is_too_low_names_the_change_that_fits(mistral):
    params = params_of(plan={"vram_limit_gb": 12.0}, train={"batch_size": 4})
    run = planned_training(*mistral, params, ROWS)
    needed = vram.predict(mistral[1], run).device
    with pytest.raises(StageError) as refused:
        plan.refuse_over_limit(*mistral, params, ROWS, needed)
    line = str(refused.value)
    assert f"would need {needed / 1e9:.2f} GB and plan.vram_limit_gb is 12" in line
    assert "train.gradient_checkpointing=true" in line
    assert "\n" not in line


def test_the_advised_change_fits_and_is_the_first_that_does(mistral):
    config, shape = mistral
    params = params_of(train={"batch_size": 4}, lora={"r": 256, "dropout": 0.1})
    needed = [
        (text, vram.predict(shape, planned_training(config, shape, changed, ROWS)).device)
        for text, changed in workload.changes(params)
    ]
    now = vram.predict(shape, planned_training(config, shape, params, ROWS)).device
    assert all(size < now for _, size in needed)
    for limit in (60e9, 40e9, 30e9, 24e9):
        first = next((text for text, size in needed if size <= limit), "none of the settings")
        assert workload.cheapest_change(config, shape, params, ROWS, limit).startswith(first)


def test_what_a_further_gpu_costs_is_said(mistral):
    config, shape = mistral
    params = params_of(train={"batch_size": 4, "gradient_checkpointing": True}, lora={"r": 64})
    run = planned_training(config, shape, params, ROWS)
    lines = plan.further_gpus(shape, run).splitlines()[1:]
    said = {line[:22].strip(): float(line[22:].split()[0]) for line in lines}
    # 64 x (inputs + outputs) of seven projections in 32 layers, four bytes each.
    of_layer = 4096 + 4096 + 2 * (4096 + 1024) + 4096 + 4096 + 3 * (4096 + 14336)
    assert said["gradient buckets"] == pytest.approx(4 * 64 * 32 * of_layer / 1e9, abs=1e-3)
    assert said["layer inputs"] == pytest.approx(4 * 4096 * run.tokens * 32 / 1e9, abs=1e-3)
    assert "a rank itself" in said


def test_no_limit_and_a_high_limit_pass(mistral):
    for limit in (None, 1000.0):
        plan.refuse_over_limit(*mistral, params_of(plan={"vram_limit_gb": limit}), ROWS, 5e9)


def test_rows_beyond_the_positions_of_the_model_are_said(tiny):
    config, shape = tiny
    said = [
        plan.advice(config, shape, params_of(), Lengths([20, size], [10, 10], 2048), 5e9)
        for size in (config.max_position_embeddings, config.max_position_embeddings + 1)
    ]
    assert "longest row" not in said[0]
    assert said[1].endswith(
        "\nplan: the longest row has 513 tokens and the model was made for 512 "
        "(max_position_embeddings); lower prepare.max_length"
    )


@pytest.mark.parametrize(("size", "chunk"), [(261, 100), (260, 100), (260, 3)])
def test_a_token_beyond_the_embeddings_is_refused_where_it_is_used(
    size, chunk, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "prepared"
    rows = [([1, 2, 3], [1, 2, 3])] * 4 + [([1, 260], [1, 260]), ([2], [2])]
    write_rows(folder, rows, chunk)
    added = make_tokenizer(folder / "tokenizer")
    added.add_tokens("<new>")
    added.save_pretrained(folder / "tokenizer")
    config = AutoConfig.for_model("llama", vocab_size=size)
    if size > 260:
        check_token_ids(config, folder)
        assert capsys.readouterr().out == ""
        return
    with pytest.raises(StageError) as error:
        check_token_ids(config, folder)
    assert str(error.value) == (
        "rows.jsonl:4: has the token '<new>', which is 260, and the embeddings have 260 rows "
        "(vocab_size); take it out of the data or the template (prepare.template), or choose "
        "another model"
    )
    write_rows(folder, rows[:4])
    check_token_ids(config, folder)
    assert capsys.readouterr().out == (
        "plan: warning: the tokenizer knows 1 tokens that no row of the data has, such as "
        "'<new>', which is 260, and the embeddings have 260 rows (vocab_size): a prompt with one "
        "of them would stop the model\n"
    )
    added.pad_token = "<new>"
    added.save_pretrained(folder / "tokenizer")
    with pytest.raises(StageError, match="rows are padded with <new>, which is 260, and the"):
        check_token_ids(config, folder)


def test_the_stage_writes_the_promised_keys_and_a_constant_verdict(
    tokenizer, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/tokenizer").symlink_to(tokenizer)
    write_rows(tmp_path / "data/prepared", [([1, 2, 3], [-100, 2, 3])] * 20)
    make_tokenizer(tmp_path / "data/prepared/tokenizer")
    for folder in (tokenizer, tmp_path / "data/prepared"):
        write_sums(folder)
    (tmp_path / "params.yaml").write_text(PARAMS.read_text())
    plan.main()
    assert (tmp_path / "models/plan.ok").read_bytes() == b"training may start\n"
    found = json.loads((tmp_path / "metrics/plan.json").read_text())
    parts = ("weights", "adapter", "optimizer", "activations", "logits", "overhead")
    assert {
        "predicted_peak_vram_gb",
        "predicted_device_gb",
        "full_finetune_gb",
        "lora_gb",
        "qlora_gb",
        "smallest_gpu_gb",
        *(f"{part}_gb" for part in parts),
    } == set(found)
    assert sum(found[f"{part}_gb"] for part in parts) == pytest.approx(
        found["predicted_device_gb"], rel=1e-4
    )
    assert found["smallest_gpu_gb"] == 8
    assert "the card must have" in capsys.readouterr().out
