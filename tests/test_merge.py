import itertools
import json
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages import merge
from stages.merging import shards
from stages.shared import weights
from stages.shared.adapter_config import Config, is_target
from stages.shared.end_tokens import end_tokens
from stages.shared.outputs import SUMS, check_sums, write_sums
from stages.shared.process import StageError, sha256
from stages.shared.weights import Weights
from tests.merging import (
    edit_json,
    edit_tensors,
    in_memory,
    make_prepared,
    make_sources,
    run,
    tensors,
)
from tests.tiny import CHATML, ROOT, make_tokenizer

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
SOURCES = {
    "llama": {"arch": "llama"},
    "sharded": {"arch": "llama", "max_shard_size": "60KB", "tie_word_embeddings": False},
    "mistral": {"arch": "mistral", "lora": {"use_rslora": True, "r": 3}},
    "qwen2": {
        "arch": "qwen2",
        "lora": {
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
            "alpha_pattern": {"q_proj": 5, "^model.layers.0.self_attn.v_proj": 1},
        },
    },
    "gemma": {"arch": "gemma", "lora": {"target_modules": ["q_proj", "v_proj"]}},
    "sixteen": {"arch": "llama", "nf4": False},
    "rows": {"arch": "gemma", "lora": {"trainable_token_indices": [7, 3, 259]}},
    "rows, untied": {
        "arch": "llama",
        "tie_word_embeddings": False,
        "lora": {"trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [9]}},
    },
}
ADAPTER = "adapter_model.safetensors"
Q = "model.layers.0.self_attn.q_proj"
A = f"base_model.model.{Q}.lora_A.weight"
B = f"base_model.model.{Q}.lora_B.weight"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """One folder for each of SOURCES, made when first asked for. Not to be changed."""
    made = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make_sources(tmp_path_factory.mktemp(name), **SOURCES[name])
        return made[name]

    return get


@pytest.fixture
def llama(sources, tmp_path):
    """A copy of the llama's folder, to be changed."""
    shutil.copytree(sources("llama") / "models", tmp_path / "models")
    shutil.rmtree(tmp_path / "models/merged", ignore_errors=True)
    return tmp_path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["dequantized", "original"])
@pytest.mark.parametrize("name", SOURCES)
def test_equals_pefts_merge_in_memory(name, kind, dtype, sources, monkeypatch):
    # Small enough that every Linear of the tiny models comes in several blocks.
    monkeypatch.setattr(weights, "BLOCK_VALUES", 2000)
    monkeypatch.setattr(weights, "UNIT_ROWS", 16)
    models = sources(name) / "models"
    run(merge, sources(name), monkeypatch, merge={"base": kind, "dtype": dtype})
    expected, found = in_memory(models, kind, DTYPES[dtype]), tensors(models / "merged")
    base = Weights(models / "base")
    assert sorted(found) == base.names
    for key, tensor in found.items():
        assert tensor.dtype == DTYPES[dtype], key
        assert torch.equal(tensor, expected[key]), key
    merged = Weights(models / "merged")
    assert merged.index == base.index
    assert len(set(merged.files.values())) == (4 if name == "sharded" else 1)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        models / "merged", output_loading_info=True
    )
    assert not any(report.values()), report
    assert loaded.dtype == DTYPES[dtype]


@pytest.mark.parametrize("threads", [1, 2])
def test_large_products_in_blocks_equal_the_whole(threads, monkeypatch):
    monkeypatch.setattr(weights, "BLOCK_VALUES", 2**18)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    for rows, columns, rank in ((4096, 4096, 64), (14336, 1024, 16), (5003, 333, 8)):
        b, a = torch.randn(rows, rank), torch.randn(rank, columns)
        whole = b @ a
        blocks = weights.row_blocks((rows, columns), torch.device("cpu"))
        assert len(blocks) > 6
        assert all(torch.equal(b[block] @ a, whole[block]) for block in blocks)
    torch.set_num_threads(1)


def test_shard_is_what_safetensors_writes(tmp_path):
    content = {
        "b": torch.randn(3, 5).half(),
        "a": torch.randn(7).half(),
        "c": torch.ones(()).half(),
    }
    entries = {name: shards.Entry("F16", tuple(content[name].shape)) for name in sorted(content)}
    blocks = [content[name] for name in sorted(content)]
    digest = shards.write_shard(tmp_path / "ours", entries, blocks)
    assert digest == sha256(tmp_path / "ours")
    save_file(content, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_copied_tensors_keep_their_types(tmp_path):
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool)
    content = {str(i): torch.ones(i + 1, 2, dtype=kind) for i, kind in enumerate(kinds)}
    save_file(content, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = weights.Weights(tmp_path)
    entries = {name: shards.copied_entry(source, name) for name in source.names}
    shards.write_shard(tmp_path / "copy", entries, map(source.read, entries))
    copied = load_file(tmp_path / "copy")
    assert all(torch.equal(copied[name], content[name]) for name in content)
    assert {name: t.dtype for name, t in copied.items()} == dict(zip(content, kinds, strict=True))


def test_all_that_the_rows_end_with_ends_an_answer_of_the_merged_model(llama, monkeypatch):
    """prepare saves these tokens beside the tokenizer, and train copies them."""
    adapter = llama / "models/adapter"
    (adapter / "generation_config.json").write_text('{"eos_token_id": [2, 1]}')
    write_sums(adapter)
    run(merge, llama, monkeypatch)
    generation = json.loads((llama / "models/merged/generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 1]
    # A token that is not in tokenizer.json cannot end an answer.
    edit_json(llama / "models/merged/tokenizer_config.json", eos_token="absent")
    assert end_tokens(llama / "models/merged", 7) == [7, 2, 1]


def test_folder_serves_alone(llama, monkeypatch, capsys):
    edit_json(llama / "models/base/generation_config.json", eos_token_id=0, top_p=0.9)
    write_sums(llama / "models/base")
    run(merge, llama, monkeypatch)
    merged = llama / "models/merged"
    config = json.loads((merged / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert "quantization_config" not in config
    # The base ends with token 0, the tuned model with the tokenizer's <|im_end|>.
    generation = json.loads((merged / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 2]
    assert generation["top_p"] == 0.9
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.chat_template == CHATML
    assert (merged / "LICENSE").read_text() == "Free for all.\n"
    record = json.loads((merged / "merge.json").read_text())
    assert (record["base"], record["dtype"]) == ("dequantized", "float16")
    assert (record["tensors"], record["updated_tensors"], record["flushed_to_zero"]) == (20, 14, 0)
    # The command line would make the merge differ between machines.
    assert "device" not in record
    check_sums(merged, "merge")
    model = AutoModelForCausalLM.from_pretrained(merged)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=2).shape[1] > 2
    assert "GB to models/merged" in capsys.readouterr().out


def test_second_merge_gives_the_same_bytes(llama, monkeypatch):
    run(merge, llama, monkeypatch)
    first = (llama / "models/merged" / SUMS).read_text()
    run(merge, llama, monkeypatch)
    assert (llama / "models/merged" / SUMS).read_text() == first


def test_adapter_from_elsewhere(llama, monkeypatch, capsys):
    """As saved by plain PEFT: in bfloat16, without checksums or a tokenizer."""
    adapter = llama / "models/adapter"
    for file in adapter.iterdir():
        if not file.name.startswith("adapter_"):
            file.unlink()
    edit_tensors(adapter / ADAPTER, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    shutil.copy(ROOT / "tests/tiny.py", adapter / "training_args.bin")
    make_prepared(llama)
    run(merge, llama, monkeypatch)
    expected, found = (
        in_memory(llama / "models", "dequantized", torch.float16),
        tensors(llama / "models/merged"),
    )
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    assert not (llama / "models/merged/training_args.bin").exists()
    said = capsys.readouterr().out
    assert "models/adapter has no SHA256SUMS: taken as it is" in said
    assert "models/adapter has no tokenizer; using that of the rows" in said


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_half_a_tokenizer_is_none(name, llama, monkeypatch):
    """Older tools saved a slow one."""
    adapter, prepared = llama / "models/adapter", llama / "data/prepared"
    (adapter / SUMS).unlink()
    (adapter / name).unlink()
    make_prepared(llama)
    make_tokenizer(prepared / "tokenizer", chat_template="rows")
    write_sums(prepared)
    run(merge, llama, monkeypatch)
    merged = AutoTokenizer.from_pretrained(llama / "models/merged")
    assert merged.chat_template == "rows"
    (prepared / "tokenizer" / name).write_text("")
    with pytest.raises(StageError, match=rf"data/prepared/tokenizer/{name} is damaged .* prepare"):
        run(merge, llama, monkeypatch)


@pytest.mark.parametrize("base", ["base", "quantized"])
def test_adapter_loads_with_peft(base, sources):
    models = sources("llama") / "models"
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(models / base), models / "adapter"
    )
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 14


def config(**changes):
    return lambda adapter: edit_json(adapter / "adapter_config.json", **changes)


def factors(change):
    return lambda adapter: edit_tensors(adapter / ADAPTER, change)


def nan(t):
    t[B][3, 1] = float("nan")


def other_base(t):
    t[A] = torch.zeros(4, 96)


def rename(t):
    t[A.replace("q_proj", "qq_proj")] = t.pop(A)
    t[B.replace("q_proj", "qq_proj")] = t.pop(B)


def head(t):
    t["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 64)
    t["base_model.model.lm_head.lora_B.weight"] = torch.zeros(260, 4)


def add(key, *shape):
    return factors(lambda t: t.update({f"base_model.model.{key}": torch.zeros(*shape)}))


def folder_as(name):
    return lambda adapter: [(adapter / name).unlink(), (adapter / name).mkdir()]


def truncate(adapter):
    (adapter / ADAPTER).write_bytes((adapter / ADAPTER).read_bytes()[:-100])


NAMES = [
    "lm_head",
    "q_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.1.mlp.experts.0.up_proj",
    "model.h.1.xq_proj",
]
TARGETS: list = [["q_proj"], "q_proj", r".*\.q_proj", ["self_attn.q_proj", "up_proj"], [NAMES[2]]]
EXCLUDED: list = [None, [], "", "lm_head", r".*\.0\..*", ["q_proj"], [NAMES[3]]]
LAYERS: list = [(None, None), ([], None), (0, None), ([1, 11], None), ([0], "layers"),
                ([1], ["h", "layers"]), ([0], "experts"), ([0], [])]  # fmt: skip


def test_an_adapters_modules_are_those_of_peft():
    for targets, excluded, (layers, pattern) in itertools.product(TARGETS, EXCLUDED, LAYERS):
        settings = {
            "target_modules": targets,
            "exclude_modules": excluded,
            "layers_to_transform": layers,
            "layers_pattern": pattern,
        }
        ours = Config(r=1, lora_alpha=1, **settings)
        found = [name for name in NAMES if is_target(ours, name)]
        peft = SimpleNamespace(**settings)
        assert found == [name for name in NAMES if check_target_module_exists(peft, name)], settings


def rows(ids, *shape):
    def change(adapter):
        config(trainable_token_indices=ids)(adapter)
        add("model.embed_tokens.token_adapter.trainable_tokens_delta", *shape)(adapter)

    return change


REFUSED = [
    (factors(nan), f"{Q}: lora_B has NaN or infinite values"),
    (config(r=8), "model.layers.0.mlp.down_proj: lora_A is 4 x 128 and must be 8 x 128 (rank 8"),
    (factors(other_base), f"{Q}: lora_A is 4 x 96 and must be 4 x 64"),
    (factors(lambda t: t.update({A: t[A].T.contiguous()})), "64 x 4 and must"),
    (
        factors(lambda t: t.update({B: t[B].to(torch.int8)})),
        "lora_B.weight is I8, not a float",
    ),
    (folder_as("adapter_config.json"), "adapter_config.json: not a file"),
    (folder_as(ADAPTER), "adapter_model.safetensors: not a file"),
    (factors(rename), f"self_attn.qq_proj: the base has no such module (nearest: {Q}"),
    (factors(lambda t: t.pop(A)), f"{Q}: lora_A is missing"),
    (factors(lambda t: t.pop(B)), f"{Q}: lora_B is missing"),
    (
        factors(lambda t: (t.pop(A), t.pop(B))),
        f"{Q} is among the adapter's target_modules and has no tensors",
    ),
    (factors(head), "lm_head: LoRA on the embeddings or the output head"),
    (add("model.embed_tokens.lora_embedding_A", 4, 260), "lora_embedding_A is no lora_A or lora_B"),
    (add(f"{Q}.lora_magnitude_vector", 64), "lora_magnitude_vector is no lora_A or lora_B"),
    (add("lm_head.modules_to_save.weight", 260, 64), "modules_to_save.weight is no lora_A"),
    (config(use_dora=True), "use_dora is not supported: DoRA"),
    (config(modules_to_save=["lm_head"]), "modules_to_save is not supported: whole retrained"),
    (config(bias="all"), "bias: all is not supported"),
    (config(fan_in_fan_out=True), "fan_in_fan_out is not supported"),
    (
        config(target_parameters=["experts.gate"]),
        "experts.gate of target_parameters is no tensor of experts of the base",
    ),
    (config(trainable_token_indices=[3]), "trainable_token_indices has no rows; it is incomplete"),
    (rows([3, 9], 2, 32), "embed_tokens: has 2 x 32 values of rows and must have 2 x 64"),
    (
        add(f"{Q}.token_adapter.trainable_tokens_delta", 1, 64),
        f"{Q}: has rows, and is no embedding or head of the base",
    ),
    (rows([3, 3], 2, 64), "has 2 x 64 values of rows and must have 2 x 64, one for each"),
    (rows([], 0, 64), "embed_tokens: has 0 x 64 values of rows and must have 0 x 64, one for each"),
    (
        add("model.norm.token_adapter.trainable_tokens_delta", 1, 64),
        "model.norm: has rows, and is no embedding or head of the base",
    ),
    (rows([2**20], 1, 64), "a row for token 1048576, and the base has 260 rows"),
    (rows([-1], 1, 64), "trainable_token_indices"),
    (config(layer_replication=[[0, 2]]), "layer_replication is not supported"),
    (config(a_new_setting={"x": 1}), "a_new_setting is not supported: its effect on a merge"),
    (config(init_lora_weights="pissa"), "init_lora_weights: pissa is not supported: it changes"),
    (config(init_lora_weights="olora"), "init_lora_weights: olora is not supported: it changes"),
    (config(peft_type="VERA"), "peft_type VERA is not supported"),
    (lambda a: (a / "adapter_config.json").write_text("{"), "adapter_config.json: not JSON"),
    (lambda a: (a / "adapter_config.json").unlink(), "is missing; models/adapter is no PEFT"),
    (
        lambda a: (a / "adapter_config.json").write_text("[]"),
        "json: must be a mapping (got [])",
    ),
    (config(r="16"), "adapter_config.json: r: must be a whole number (got '16')"),
    (config(r=0), "adapter_config.json: r: must be 1 or more (got 0)"),
    (config(r=-4, use_rslora=True), "r: must be 1 or more (got -4)"),
    (config(lora_alpha=None), "adapter_config.json: lora_alpha: must be a number (got None)"),
    (config(alpha_pattern={"(": 3}), "a pattern is no regular expression that matches"),
    (config(lora_alpha=float("nan")), "lora_alpha: must be a finite number (got nan)"),
    (config(lora_alpha=float("inf")), "lora_alpha: must be a finite number (got inf)"),
    (config(lora_alpha=1e30), "lora_alpha: must be 1000000 or less (got 1e+30)"),
    (config(alpha_pattern={"q_proj": 1e30}), "alpha_pattern: q_proj"),
    (
        config(target_modules=["q_proj", "v_proj"]),
        "model.layers.0.mlp.down_proj has tensors and is not among the adapter's target_modules",
    ),
    (
        config(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers"),
        "model.layers.0.mlp.down_proj has tensors and is not among",
    ),
    (config(exclude_modules="(.*a)*b|.*q_proj"), f"{Q} has tensors and is not among"),
    (lambda a: (a / ADAPTER).unlink(), "adapter_model.safetensors: cannot be read"),
    (
        lambda a: (a / ADAPTER).rename(a / "adapter_model.bin"),
        "models/adapter has pickled weights only (adapter_model.bin), which can run code when",
    ),
    (truncate, "adapter_model.safetensors: cannot be read"),
]


@pytest.mark.parametrize(("spoil", "message"), REFUSED, ids=[row[1][:40] for row in REFUSED])
def test_refuses_an_adapter_by_name(spoil, message, llama, monkeypatch):
    (llama / "models/adapter" / SUMS).unlink()
    spoil(llama / "models/adapter")
    with pytest.raises(StageError) as error:
        run(merge, llama, monkeypatch)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not list((llama / "models").glob("*merged*"))


def scaled(name, factor):
    def change(content):
        content[name] = content[name] * factor

    return change


def part_infinite(content):
    content["model.norm.weight"][5] = float("inf")


def experts(content):
    content["model.layers.0.mlp.experts.0.w1.weight"] = torch.zeros(2, 2)


NORM = "model.norm.weight"
SPOILED = [
    ("quantized", scaled(NORM, 1e5), f"{NORM}: 64 values overflow float16 (largest"),
    ("quantized", scaled(NORM, -1e-9), f"{NORM}: 64 of 64 values become zero in float16"),
    ("quantized", part_infinite, f"{NORM}: NaN or infinite values in the base"),
    ("quantized", lambda t: t.pop(NORM), f"models/quantized lacks {NORM} of the base"),
    ("quantized", lambda t: t.update(more=torch.zeros(2)), "more has shape (2,) and in the base"),
    ("quantized", lambda t: t.update({NORM: t[NORM].int()}), f"{NORM} is I32, not a float type"),
    ("base", experts, "models/quantized lacks model.layers.0.mlp.experts.0.w1.weight of the base"),
]


@pytest.mark.parametrize(("where", "spoil", "message"), SPOILED, ids=[r[2][:40] for r in SPOILED])
def test_refuses_a_base_by_name(where, spoil, message, llama, monkeypatch):
    edit_tensors(llama / "models" / where / "model.safetensors", spoil)
    write_sums(llama / "models" / where)
    with pytest.raises(StageError, match=message.replace("(", r"\(").replace(")", r"\)")):
        run(merge, llama, monkeypatch)
    assert not list((llama / "models").glob("*merged*"))


def test_counts_what_becomes_zero(llama, monkeypatch):
    def change(content):
        content["model.embed_tokens.weight"][7, :5] = -1e-9
        content["model.embed_tokens.weight"][8] = 0

    edit_tensors(llama / "models/quantized/model.safetensors", change)
    write_sums(llama / "models/quantized")
    run(merge, llama, monkeypatch)
    record = json.loads((llama / "models/merged/merge.json").read_text())
    assert record["flushed_to_zero"] == 5
    run(merge, llama, monkeypatch, merge={"dtype": "bfloat16"})
    record = json.loads((llama / "models/merged/merge.json").read_text())
    assert record["flushed_to_zero"] == 0


def test_bfloat16_holds_what_float16_cannot(llama, monkeypatch):
    edit_tensors(llama / "models/quantized/model.safetensors", scaled(NORM, 1e5))
    write_sums(llama / "models/quantized")
    run(merge, llama, monkeypatch, merge={"dtype": "bfloat16"})
    assert tensors(llama / "models/merged")[NORM].max() > 65504


def test_refuses_damaged_sources(llama, monkeypatch):
    edit_tensors(llama / "models/quantized/model.safetensors", scaled(NORM, 2))
    with pytest.raises(StageError, match=r"model\.safetensors is damaged .* quantize"):
        run(merge, llama, monkeypatch)


@pytest.mark.parametrize("kind", ["dequantized", "original"])
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "LICENSE"]
)
def test_refuses_damaged_companions(name, kind, llama, monkeypatch):
    """They would be copied into the merged model."""
    make_tokenizer(llama / "models/base")
    write_sums(llama / "models/base")
    file = llama / "models/base" / name
    file.write_text(file.read_text().replace("e", "c", 1))
    with pytest.raises(StageError, match=rf"models/base/{name} is damaged .* fetch_model"):
        run(merge, llama, monkeypatch, merge={"base": kind})
    file.unlink()
    with pytest.raises(StageError, match=rf"models/base/{name} is missing; .* fetch_model"):
        run(merge, llama, monkeypatch, merge={"base": kind})


def test_refuses_a_full_disk(llama, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 10**5))
    with pytest.raises(
        StageError, match=r"models: the merged model takes 0\.00 GB, but 0\.00 GB are free"
    ):
        run(merge, llama, monkeypatch)
    assert not list((llama / "models").glob("*merged*"))


@pytest.mark.slow
def test_killed_merge_leaves_no_result(llama, monkeypatch):
    """SIGKILL after the weights are written: no models/merged, and the next merge is whole."""
    run(merge, llama, monkeypatch)
    undisturbed = (llama / "models/merged" / SUMS).read_text()
    shutil.rmtree(llama / "models/merged")
    code = (
        "import os, signal; from stages import merge; "
        "merge.write_companions = lambda *_: os.kill(os.getpid(), signal.SIGKILL); merge.main()"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT), "PATH": ""}, cwd=llama
    )
    assert killed.returncode == -signal.SIGKILL
    assert (llama / "models/.merged.partial/model.safetensors").exists()
    assert not (llama / "models/merged").exists()
    run(merge, llama, monkeypatch)
    assert (llama / "models/merged" / SUMS).read_text() == undisturbed
    assert not (llama / "models/.merged.partial").exists()
