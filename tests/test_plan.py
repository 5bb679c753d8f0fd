"""The plan stage: what it accepts, refuses, writes and advises."""

import json

import pyarrow as pa
import pytest
import torch
import yaml
from families import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM

from stages import plan
from stages.planning import advice
from stages.planning.advice import planned
from stages.planning.token_ids import check_token_ids
from stages.shared import placement, workload
from stages.shared.outputs import write_sums
from stages.shared.params import Params
from stages.shared.placement import Placement
from stages.shared.process import StageError
from stages.shared.rows import SCHEMA
from stages.shared.vram import CARDS_GB, sizes_of
from stages.shared.workload import KEPT, Lengths, match_targets, read_model
from tests.tiny import PARAMS, SHAPE, make_model, make_tokenizer


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
        (
            ["q_proj", "v_porj"],
            "v_porj is no linear layer of the base.*did you mean v_proj",
        ),
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
        ({"model_type": "no-such-model"}, "unsupported by plan"),
        ({"model_type": "gpt2"}, "unsupported by plan"),
        ({}, "unsupported by plan"),
    ],
)
def test_a_model_that_it_does_not_know_is_refused_in_one_line(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StageError, match=message) as refused:
        read_model(tmp_path)
    assert "\n" not in str(refused.value)


def sizes_for(model, params, rows=ROWS):
    config, shape = model
    return sizes_of(shape, planned(config, shape, params, rows))


def chosen(model, params, limit):
    """The placement that training would choose within `limit` bytes; None if nothing fits."""
    kept = KEPT[params.train.gradient_checkpointing]
    return placement.choose(sizes_for(model, params), limit, kept=kept)


def test_a_limit_that_is_too_low_names_the_change_that_fits(mistral):
    params = params_of(plan={"vram_limit_gb": 8.0}, train={"batch_size": 4})
    sizes = sizes_for(mistral, params)
    least = placement.predict(sizes, placement.tightest(sizes, "all")).device
    with pytest.raises(StageError) as refused:
        plan.refuse_over_limit(*mistral, params, ROWS, sizes)
    line = str(refused.value)
    assert f"needs at least {least / 1e9:.2f} GB, but plan.vram_limit_gb is 8" in line
    assert line.endswith(advice.cheapest_change(*mistral, params, ROWS, 8e9))
    assert "train.gradient_checkpointing=auto" in line
    assert "\n" not in line


SETTINGS = {
    "nothing recomputed": {
        "train": {"batch_size": 4, "gradient_checkpointing": False},
        "lora": {"r": 256, "dropout": 0.1},
    },
    "auto": {
        "train": {"batch_size": 4, "gradient_checkpointing": "auto"},
        "lora": {"r": 256, "dropout": 0.1},
        "quantize": {"type": "none"},
    },
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_advised_change_fits_and_is_the_first_that_does(mistral, settings):
    params = params_of(**SETTINGS[settings])
    advised = set()
    for limit in (60e9, 40e9, 30e9, 24e9, 16e9, 12e9, 8e9, 4e9):
        said = advice.cheapest_change(*mistral, params, ROWS, limit)
        for text, changed in advice.changes(params):
            if placed := chosen(mistral, changed, limit):
                needed = placement.predict(sizes_for(mistral, changed), placed).device
                assert needed <= limit
                assert said == f"cheapest change that fits: {text} ({needed / 1e9:.2f} GB)"
                break
        else:
            text = "no single setting"
            assert said.startswith(text)
        advised.add(text)
    # Otherwise the limits would make no difference.
    assert len(advised) > 2


@pytest.mark.parametrize(
    ("checkpointing", "limit"), [("auto", None), (False, None), ("auto", 12.0), (False, 24.0)]
)
def test_what_some_placement_keeps_to_passes(mistral, checkpointing, limit):
    train = {"batch_size": 2, "gradient_checkpointing": checkpointing}
    params = params_of(plan={"vram_limit_gb": limit}, train=train)
    plan.refuse_over_limit(*mistral, params, ROWS, sizes_for(mistral, params))


def test_no_checkpointing_is_refused_where_it_cannot_fit(mistral):
    limit = 12.0
    for checkpointing, refused in (("auto", False), (True, False), (False, True)):
        train = {"batch_size": 4, "gradient_checkpointing": checkpointing}
        params = params_of(plan={"vram_limit_gb": limit}, train=train)
        sizes = sizes_for(mistral, params)
        if refused:
            with pytest.raises(StageError, match=r"plan\.vram_limit_gb is 12"):
                plan.refuse_over_limit(*mistral, params, ROWS, sizes)
        else:
            plan.refuse_over_limit(*mistral, params, ROWS, sizes)


@pytest.mark.parametrize("checkpointing", ["auto", True, False])
def test_each_card_has_what_it_holds_or_nothing(mistral, checkpointing):
    train = {"batch_size": 4, "gradient_checkpointing": checkpointing}
    params = params_of(train=train, lora={"r": 256})
    sizes, kept = sizes_for(mistral, params), KEPT[checkpointing]
    found = plan.cards(sizes, kept, scoring_of(mistral, params))
    assert [entry["card_gb"] for entry in found] == list(CARDS_GB)
    assert {entry["placed"] is None for entry in found} == {True, False}
    for entry in found:
        card, placed = entry["card_gb"], entry["placed"]
        best = placement.choose(sizes, card * 1e9, kept=kept)
        assert (placed is None) == (best is None)
        if placed is None:
            continue
        assert placed["predicted_peak_vram_gb"] < placed["predicted_device_gb"] <= card
        assert placed["streamed_layers"] == best.streamed
        assert placed["dense_layers"] == best.dense
        assert (placed["sent_gb_per_step"] > 0) == bool(best.streamed or best.offload)
        layers = sizes.layers
        if checkpointing != "auto":
            assert placed["kept_mlp_layers"] == (0 if checkpointing else layers)
            assert placed["kept_attention_layers"] == (0 if checkpointing else layers)


def scoring_of(model, params):
    config, shape = model
    return plan.scoring_stages(shape, planned(config, shape, params, ROWS), 2048)


def test_each_card_says_how_evaluate_and_verify_fit(mistral):
    params = params_of(train={"gradient_checkpointing": "auto"})
    found = plan.cards(sizes_for(mistral, params), "auto", scoring_of(mistral, params))
    base, merged = (
        [entry[f"{stage}_streamed_layers"] for entry in found] for stage in ("evaluate", "verify")
    )
    # 14.5 GB in 16 bit and 4.1 in NF4: whole on large cards, none of them too small for layers.
    for layers, whole in ((base, 8), (merged, 24)):
        assert [n == 0 for n in layers] == [card >= whole for card in CARDS_GB]
        assert None not in layers[1:]
    assert merged[1] > base[1]


def test_the_longest_row_of_any_held_out_set_counts(tmp_path):
    for name, lengths in (("eval", [5, 9]), ("group", [12, 3]), ("train", [99])):
        rows = [
            {"row": name, "input_ids": [3] * n, "labels": [3] * n, "prompt_tokens": 0}
            | {"scored_bytes": n}
            for n in lengths
        ]
        path = str(tmp_path / f"{name}.arrow")
        with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, SCHEMA) as out:
            out.write_table(pa.Table.from_pylist(rows, SCHEMA))
    assert plan.longest_held_out(tmp_path) == 12


def test_the_table_says_of_each_card_what_fits(mistral):
    params = params_of(train={"gradient_checkpointing": "auto"})
    sizes = sizes_for(mistral, params)
    found = plan.cards(sizes, "auto", scoring_of(mistral, params))
    lines = plan.cards_table(found, sizes.layers).splitlines()[1:]
    for line, entry in zip(lines, found, strict=True):
        size, *words = line.split()
        assert int(size) == entry["card_gb"]
        placed = entry["placed"]
        others = [entry[f"{stage}_streamed_layers"] for stage in ("evaluate", "verify")]
        said = ["no" if n is None else "streamed" if n else "resident" for n in others]
        if placed is None:
            assert words == ["does", "not", "fit", *said]
            continue
        at = next(i for i in range(len(words)) if words[i : i + 2] == said)
        assert at > words.index(f"{placed['predicted_device_gb']:.1f}")
        assert f"{placed['predicted_device_gb']:.1f}" in words
        assert f"{placed['sent_gb_per_step']:.1f}" in line
        assert ("streamed" in words[:4]) == bool(placed["streamed_layers"])
        dense = placed["dense_layers"]
        assert (f"resident, {dense} in 16 bit " in line) == bool(dense)
    slow = {"copies_hide": 0, "sent_gb_per_step": 7.5, "mlp_tile_tokens": 0}
    fits = next(entry["placed"] for entry in found if entry["placed"])
    table = plan.cards_table([found[-1] | {"placed": fits | slow}], sizes.layers)
    assert table.endswith(" 7.5, slower")


def test_rows_beyond_the_positions_of_the_model_are_said(tiny, capsys):
    config, _ = tiny
    said = []
    for size in (config.max_position_embeddings, config.max_position_embeddings + 1):
        plan.check_positions(config, Lengths([20, size], [10, 10], 2048))
        said.append(capsys.readouterr().out)
    assert said == [
        "",
        "plan: warning: the longest row has 513 tokens, but the model supports 512 "
        "(max_position_embeddings); lower prepare.max_length\n",
    ]


@pytest.mark.parametrize("family", sorted(plan.TABLES))
def test_rows_beyond_a_table_of_positions_are_refused(family):
    """The model itself would end with an IndexError."""
    settings = SHAPE | FAMILIES[family].settings | {"max_position_embeddings": 16}
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 16, dtype=torch.long), use_cache=False)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.zeros(1, 17, dtype=torch.long), use_cache=False)
    plan.check_positions(config, Lengths([16], [10], 2048))
    with pytest.raises(StageError, match="has 17 tokens, but the model supports 16"):
        plan.check_positions(config, Lengths([17], [10], 2048))


def test_what_a_further_gpu_costs_is_said(mistral):
    config, shape = mistral
    params = params_of(train={"batch_size": 4, "gradient_checkpointing": True}, lora={"r": 64})
    run = planned(config, shape, params, ROWS)
    placed = Placement(offload=True)
    lines = plan.further_gpus(sizes_of(shape, run), placed).splitlines()[1:]
    said = {line[:22].strip(): float(line[22:].split()[0]) for line in lines}
    # 64 x (inputs + outputs) of seven projections in 32 layers, four bytes each.
    of_layer = 4096 + 4096 + 2 * (4096 + 1024) + 4096 + 4096 + 3 * (4096 + 14336)
    assert said["gradient buckets"] == pytest.approx(4 * 64 * 32 * of_layer / 1e9, abs=1e-3)
    assert said["layer inputs"] == pytest.approx(4 * 4096 * run.tokens * 32 / 1e9, abs=1e-3)
    assert "process" in said


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
        "(vocab_size); take it out of the data or the template (prepare.template), name it in "
        "lora.new_tokens, or choose another model"
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


@pytest.fixture
def project(tokenizer, tmp_path, monkeypatch):
    """A project in which plan can run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/tokenizer").symlink_to(tokenizer)
    write_rows(tmp_path / "data/prepared", [([1, 2, 3], [-100, 2, 3])] * 20)
    make_tokenizer(tmp_path / "data/prepared/tokenizer")
    for folder in (tokenizer, tmp_path / "data/prepared"):
        write_sums(folder)
    (tmp_path / "params.yaml").write_text(PARAMS.read_text())
    return tmp_path


def test_the_stage_writes_the_promised_keys_and_a_constant_verdict(project, capsys):
    plan.main()
    assert (project / "models/plan.ok").read_bytes() == b"training may start\n"
    found = json.loads((project / "metrics/plan.json").read_text())
    parts = ("weights", "adapter", "optimizer", "activations", "logits", "overhead")
    assert {
        "predicted_peak_vram_gb",
        "predicted_device_gb",
        "full_finetune_gb",
        "lora_gb",
        "qlora_gb",
        "smallest_gpu_gb",
        "vram_limit_gb",
        "cards",
        *(f"{part}_gb" for part in parts),
    } == set(found)
    assert sum(found[f"{part}_gb"] for part in parts) == pytest.approx(
        found["predicted_device_gb"], rel=1e-4
    )
    fitting = [entry["card_gb"] for entry in found["cards"] if entry["placed"]]
    assert found["smallest_gpu_gb"] == min(fitting)
    assert found["vram_limit_gb"] is None
    said = capsys.readouterr().out
    assert "GPU memory needed" in said
    assert f"{found['predicted_device_gb']:.3f} GB" in said


def test_plan_json_is_the_same_on_every_machine(project, monkeypatch, capsys):
    """It contains nothing about this machine."""
    written, said = [], []
    for gpu, free in ((False, 0), (True, 3 * 10**9), (True, 80 * 10**9)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_, free=free: (free, free))
        plan.main()
        written.append((project / "metrics/plan.json").read_bytes())
        said.append(capsys.readouterr().out)
    assert written[0] == written[1] == written[2]
    assert "NVIDIA GPU (none here)" in said[0]
    assert "on this GPU" in said[1]


def test_a_limit_is_written_for_train_to_read(project):
    params = yaml.safe_load(PARAMS.read_text())
    params["plan"]["vram_limit_gb"] = 6.5
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    plan.main()
    assert json.loads((project / "metrics/plan.json").read_text())["vram_limit_gb"] == 6.5


def test_over_the_limit_nothing_is_written(project):
    params = yaml.safe_load(PARAMS.read_text())
    params["plan"]["vram_limit_gb"] = 0.5
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(StageError, match=r"GB, but plan\.vram_limit_gb is 0\.5"):
        plan.main()
    assert not (project / "metrics/plan.json").exists()
    assert not (project / "models/plan.ok").exists()
