import json
import shutil
import tempfile
from collections import Counter
from types import SimpleNamespace
from weakref import WeakValueDictionary

import pytest
import torch
from peft.tuners.lora.bnb import Linear4bit
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from stages import merge, verify
from stages.quantize import quantize
from stages.shared import adapter, scored_model, scoring, streaming
from stages.shared.model import load_base
from stages.shared.outputs import SUMS, write_sums
from stages.shared.process import StageError
from stages.shared.weights import INDEX, SINGLE, Weights
from stages.verifying import agreement, tensor_check
from tests.merging import (
    edit_json,
    edit_tensors,
    in_memory,
    make_prepared,
    make_sources,
    run,
    tensors,
)
from tests.tiny import CHATML

pytestmark = pytest.mark.slow

ATTENTION = "model.layers.0.self_attn"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A merged llama in five shards; must not be changed."""
    root = make_sources(
        tmp_path_factory.mktemp("whole"), max_shard_size="60KB", tie_word_embeddings=False
    )
    make_prepared(root)
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(merge, root, monkeypatch)
    return root


@pytest.fixture
def project(whole, tmp_path):
    """A copy of it, which may be changed."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    return tmp_path


def results(root):
    return json.loads((root / "metrics/verify.json").read_text())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "gemma"])
def test_a_right_merge_passes(arch, dtype, tmp_path, monkeypatch, capsys):
    make_prepared(make_sources(tmp_path, arch, lora={"target_modules": ["q_proj", "down_proj"]}))
    run(merge, tmp_path, monkeypatch, merge={"dtype": dtype})
    run(verify, tmp_path, monkeypatch, merge={"dtype": dtype})
    found = results(tmp_path)
    assert abs(found["perplexity_change_percent"]) < 0.5
    # The other base was never trained on: its divergence is that of the quantization.
    assert 0 <= found["mean_kl"] < 0.1 * found["other_base_mean_kl"]
    assert found["mean_kl"] < found["max_kl"]
    assert found["token_agreement"] > 0.98
    assert found["nonfinite_values"] == 0
    assert (tmp_path / "models/verify.ok").read_text() == "verified\n"
    assert "verify: passed" in capsys.readouterr().out


def test_a_head_of_its_own_stays_one(tmp_path, monkeypatch):
    """Of a base whose config.json ties it: transformers 4 would compute something else."""
    make_prepared(make_sources(tmp_path))
    models = tmp_path / "models"

    def add_head(content):
        content["lm_head.weight"] = content["model.embed_tokens.weight"].flip(0).clone()

    edit_tensors(models / "base/model.safetensors", add_head)
    shutil.rmtree(models / "quantized")
    (models / "quantized").mkdir()
    quantize(models / "base", models / "quantized", double_quant=True)
    for name in ("base", "quantized"):
        write_sums(models / name)
    run(merge, tmp_path, monkeypatch)
    run(verify, tmp_path, monkeypatch)
    config = models / "merged/config.json"
    assert json.loads(config.read_text())["tie_word_embeddings"] is False
    edit_json(config, tie_word_embeddings=True)
    write_sums(models / "merged")
    with pytest.raises(StageError, match="tie_word_embeddings is True and must be False"):
        run(verify, tmp_path, monkeypatch)


def in_shards(root, change):
    """Apply `change` to all merged tensors as one dictionary and write each to its own shard."""
    merged = root / "models/merged"
    content = tensors(merged)
    change(content)
    for file in merged.glob("*.safetensors"):
        edit_tensors(file, lambda old: old.update({k: content[k] for k in old if k in content}))


def swap(content, root):
    a, b = f"{ATTENTION}.q_proj.weight", f"{ATTENTION}.o_proj.weight"
    content[a], content[b] = content[b], content[a]


def leave_layer_unmerged(content, root):
    plain = without_adapter(root)
    content.update({k: v for k, v in plain.items() if ".layers.1." in k})


def double_alpha(content, root):
    plain = without_adapter(root)
    content.update({k: v + (v - plain[k]) for k, v in content.items()})


def transpose_a(content, root):
    name = f"{ATTENTION}.v_proj"
    factors = tensors(root / "models/adapter")
    a = factors[f"base_model.model.{name}.lora_A.weight"]
    b = factors[f"base_model.model.{name}.lora_B.weight"]
    wrong = without_adapter(root)[f"{name}.weight"].float() + 2 * b @ a.T.reshape(a.shape)
    content[f"{name}.weight"] = wrong.half()


def plant_nan(content, root):
    content["model.layers.1.mlp.up_proj.weight"][7, 9] = float("nan")


def change_one_value(content, root):
    content["model.norm.weight"][3] *= 1.01


def take_other_base(content, root):
    name = f"{ATTENTION}.k_proj.weight"
    content[name] = in_memory(root / "models", "original", torch.float16)[name]


def without_adapter(root):
    """The dequantized base in float16."""
    folder = root / "models/none"
    shutil.copytree(root / "models/adapter", folder, dirs_exist_ok=True)
    edit_tensors(
        folder / "adapter_model.safetensors",
        lambda t: t.update({k: torch.zeros_like(v) for k, v in t.items()}),
    )
    return in_memory(root / "models", "dequantized", torch.float16, "none")


DIFFERS = "not the base plus the adapter: "
FAULTS = [
    (swap, f"{DIFFERS}{ATTENTION}.o_proj.weight (40"),
    (swap, f"{ATTENTION}.q_proj.weight (40"),
    (leave_layer_unmerged, "model.layers.1.mlp.down_proj.weight (the adapter was not added)"),
    (leave_layer_unmerged, "and 4 more"),
    (double_alpha, "model.layers.0.mlp.down_proj.weight ("),
    (double_alpha, "and 11 more"),
    (transpose_a, f"{DIFFERS}{ATTENTION}.v_proj.weight (20"),
    (
        plant_nan,
        f"{DIFFERS}model.layers.1.mlp.up_proj.weight (1 values are NaN or infinite); merge",
    ),
    (change_one_value, f"{DIFFERS}model.norm.weight (1 of 64 values differ); merge it again"),
    (take_other_base, f"{DIFFERS}{ATTENTION}.k_proj.weight (1"),
]


@pytest.mark.parametrize(("plant", "message"), FAULTS, ids=lambda x: getattr(x, "__name__", ""))
def test_names_the_tensor_that_is_wrong(plant, message, project, monkeypatch):
    in_shards(project, lambda content: plant(content, project))
    write_sums(project / "models/merged")
    found = refusal(project, monkeypatch)
    assert message in found
    assert found.endswith("; merge it again with: dvc repro --force --single-item merge")


def refusal(project, monkeypatch, **sections):
    """The one line that verify fails with, having written nothing."""
    with pytest.raises(StageError) as error:
        run(verify, project, monkeypatch, **sections)
    assert "\n" not in str(error.value)
    assert not (project / "models/verify.ok").exists()
    assert not (project / "metrics/verify.json").exists()
    return str(error.value)


def shard(number):
    return f"model-{number:05d}-of-00004.safetensors"


def wrong_shard(merged):
    shutil.copy(merged / shard(2), merged / shard(3))


def drop_tensor(merged):
    edit_tensors(merged / shard(2), lambda t: t.pop(min(t)))


def drop_tensor_and_entry(merged):
    def change(content):
        entry = min(content)
        content.pop(entry)
        index = json.loads((merged / "model.safetensors.index.json").read_text())["weight_map"]
        index.pop(entry)
        edit_json(merged / "model.safetensors.index.json", weight_map=index)

    edit_tensors(merged / shard(2), change)


def other_type(merged):
    edit_tensors(merged / shard(2), lambda t: t.update({min(t): t[min(t)].bfloat16()}))


def other_shape(merged):
    edit_tensors(merged / shard(2), lambda t: t.update({min(t): t[min(t)][:-1].clone()}))


def lacks(name):
    return lambda merged: (merged / name).unlink()


def truncate(merged):
    (merged / shard(4)).write_bytes((merged / shard(4)).read_bytes()[:-64])


FOLDERS = [
    (wrong_shard, f"{shard(3)} holds "),
    (wrong_shard, f"puts into {shard(2)}; it is the wrong shard"),
    (drop_tensor, f"{shard(2)} lacks model.layers.0"),
    (drop_tensor_and_entry, "models/merged lacks model.layers.0"),
    (other_type, "is BF16 and must be F16"),
    (other_shape, "and in the base ("),
    (lacks("generation_config.json"), "models/merged lacks generation_config.json; merge it again"),
    (lacks("tokenizer.json"), "models/merged lacks tokenizer.json; merge it again"),
    (lambda m: edit_json(m / "config.json", dtype="bfloat16"), "dtype is bfloat16 and must be flo"),
    (
        lambda m: edit_json(m / "config.json", rms_norm_eps=1e-3),
        "config.json: rms_norm_eps is 0.00",
    ),
    (
        lambda m: edit_json(m / "generation_config.json", eos_token_id=[1]),
        "eos_token_id lacks 2 (<|im_end|>), which ends an answer; merge it again",
    ),
    (
        lambda m: edit_json(m / "generation_config.json", top_p=0.5),
        "generation_config.json: top_p is 0.5 and must be None; merge it again",
    ),
    (truncate, f"{shard(4)}: cannot be read"),
    (lambda m: (m / shard(1)).unlink(), f"{shard(1)}: cannot be read"),
    (lambda m: edit_json(m / "merge.json", base="original"), "merged with base original, not deq"),
    (lambda m: edit_json(m / "merge.json", adapter_sha256="0"), "merged with adapter_sha256 0"),
    (
        lambda m: edit_json(m / "merge.json", adapter_config_sha256="0"),
        "merged with adapter_config_sha256 0",
    ),
]


@pytest.mark.parametrize(("plant", "message"), FOLDERS, ids=[row[1][:30] for row in FOLDERS])
def test_names_what_is_wrong_with_the_folder(plant, message, project, monkeypatch):
    plant(project / "models/merged")
    write_sums(project / "models/merged")
    assert message in refusal(project, monkeypatch)


@pytest.mark.parametrize("name", ["merge.json", SUMS, shard(4), "tokenizer.json", INDEX])
def test_names_what_the_disk_lost(name, project, monkeypatch):
    """Not a wrong merge: DVC's cache may have an intact copy."""
    file = project / "models/merged" / name
    repaired = "repair it with: python -m tools.repair merge"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    found = refusal(project, monkeypatch)
    assert found.endswith(repaired)
    assert name == SUMS or f"{name} is damaged" in found
    file.unlink()
    assert refusal(project, monkeypatch) == f"models/merged/{name} is missing; {repaired}"


def test_catches_a_merge_that_computes_wrong(project, monkeypatch):
    """A bug in merge's own arithmetic, which verify does not share."""
    right = adapter.rank_and_scaling
    with monkeypatch.context() as wrong:
        wrong.setattr(adapter, "rank_and_scaling", lambda *a: (right(*a)[0], 2 * right(*a)[1]))
        run(merge, project, monkeypatch)
    message = refusal(project, monkeypatch)
    assert f"{DIFFERS}model.layers.0.mlp.down_proj.weight" in message
    assert "and 11 more" in message


def test_fails_past_the_allowed_change_with_the_numbers(project, monkeypatch):
    run(merge, project, monkeypatch, merge={"base": "original"})
    limit = {"max_perplexity_change_percent": 1e-5}
    message = refusal(project, monkeypatch, merge={"base": "original"}, verify=limit)
    for part in ("models/merged must not be shipped: perplexity", "(allowed 1e-05 %)", "mean KL"):
        assert part in message
    assert "merge.base: dequantized" in message
    run(verify, project, monkeypatch, merge={"base": "original"})
    found = results(project)
    assert found["other_base_mean_kl"] < 0.1 * found["mean_kl"]


def test_fails_on_an_activation_that_float16_cannot_hold(tmp_path, monkeypatch):
    make_prepared(make_sources(tmp_path))
    norm = "model.layers.1.post_attention_layernorm.weight"
    for name in ("base", "quantized"):
        folder = tmp_path / "models" / name
        # The product that enters down_proj grows with the square.
        edit_tensors(folder / SINGLE, lambda t: t[norm].mul_(5e3))
        write_sums(folder)
    run(merge, tmp_path, monkeypatch)
    message = refusal(tmp_path, monkeypatch)
    assert "exceeds float16's 65504; set merge.dtype: bfloat16" in message
    run(merge, tmp_path, monkeypatch, merge={"dtype": "bfloat16"})
    run(verify, tmp_path, monkeypatch, merge={"dtype": "bfloat16"})
    assert results(tmp_path)["max_activation"] > 65504


def permute(tokenizer):
    """Like another model's: the same tokens with other ids."""
    vocabulary = tokenizer["model"]["vocab"]
    a, b = sorted(vocabulary)[40:42]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]


def add_token(tokenizer):
    """As training scripts do to have a token to pad with."""
    token = {"id": 260, "content": "<new>", "special": True, "normalized": False}
    token |= {"lstrip": False, "rstrip": False, "single_word": False}
    tokenizer["added_tokens"].append(token)


def lowercase(tokenizer):
    tokenizer["normalizer"] = {"type": "Lowercase"}


def show_bytes(tokenizer):
    tokenizer["decoder"] = None


TOKENIZERS = [
    (permute, "(2 tokens differ; "),
    (add_token, "has '<new>' as 260 and that of the held-out"),
    (lowercase, "splits a text as ["),
    (show_bytes, "shows an answer as "),
]


@pytest.mark.parametrize(("change", "message"), TOKENIZERS, ids=[row[1][:9] for row in TOKENIZERS])
def test_refuses_a_tokenizer_that_says_other_things(change, message, project, monkeypatch):
    """A foreign adapter may have its own tokenizer."""
    file = project / "models/adapter/tokenizer.json"
    (project / "models/adapter" / SUMS).unlink()
    tokenizer = json.loads(file.read_text())
    change(tokenizer)
    file.write_text(json.dumps(tokenizer))
    run(merge, project, monkeypatch)
    found = refusal(project, monkeypatch)
    assert message in found
    assert "delete the tokenizer's files from models/adapter, then: dvc commit --force" in found


def test_refuses_another_template_or_end_and_takes_the_rows_own(project, monkeypatch):
    adapter = project / "models/adapter"
    (adapter / SUMS).unlink()
    (adapter / "chat_template.jinja").write_text(CHATML.replace("user", "human") + "!")
    run(merge, project, monkeypatch)
    found = refusal(project, monkeypatch)
    assert "renders a prompt as '!' and that of the held-out rows as ''; delete" in found
    edit_json(adapter / "tokenizer_config.json", eos_token="<pad>")
    run(merge, project, monkeypatch)
    found = refusal(project, monkeypatch)
    assert "ends with <pad> and that of the held-out rows with <|im_end|>; delete" in found
    for file in adapter.iterdir():
        if not file.name.startswith("adapter_"):
            file.unlink()
    run(merge, project, monkeypatch)
    run(verify, project, monkeypatch)


SCORES = {
    "merged_perplexity": 5.0,
    "adapter_perplexity": 5.0,
    "perplexity_change_percent": 0.0,
    "mean_kl": 0.0,
    "token_agreement": 1.0,
    "nonfinite_values": 0,
    "max_activation": 10.0,
}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nonfinite_values": 3}, "3 predicted values are NaN or infinite"),
        ({"perplexity_change_percent": -1.5}, "-1.50 % (allowed 1 %)"),
        ({"perplexity_change_percent": float("nan")}, "nan % (allowed 1 %)"),
        ({"max_activation": float("inf")}, "an activation of inf exceeds"),
        ({"max_activation": float("nan")}, "an activation of nan exceeds"),
    ],
)
def test_scores_that_are_refused(values, message):
    verify.check_scores(SCORES, 1.0, "float16")
    with pytest.raises(StageError) as error:
        verify.check_scores(SCORES | values, 1.0, "float16")
    assert message in str(error.value)


def test_kl_agrees_with_a_plain_loop_and_its_cache_is_bounded(project, monkeypatch):
    run(verify, project, monkeypatch)
    full = results(project)
    rows = verify.read_rows(verify.held_out_sets()[""])
    reference = verify.load_adapter(
        load_base(verify.QUANTIZED, torch.device("cpu")), verify.ADAPTER
    )
    merged = AutoModelForCausalLM.from_pretrained(verify.MERGED, dtype=torch.float64)
    divergences, agreed, nll = [], [], []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        scored = torch.tensor(row["labels"][1:]) >= 0
        with torch.no_grad():
            p, q = (
                m(ids).logits[0, :-1][scored].double().log_softmax(-1) for m in (reference, merged)
            )
        divergences.append((p.exp() * (p - q)).sum(-1))
        agreed.append(p.argmax(-1) == q.argmax(-1))
        nll.append(-q.gather(-1, ids[0, 1:][scored][:, None]))
    assert full["kl_tokens"] == len(torch.cat(agreed))
    assert full["mean_kl"] == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-3)
    assert full["max_kl"] == pytest.approx(float(torch.cat(divergences).max()), rel=1e-3)
    assert full["token_agreement"] == pytest.approx(float(torch.cat(agreed).double().mean()))
    assert full["merged_perplexity"] == pytest.approx(float(torch.cat(nll).mean().exp()), rel=1e-5)
    monkeypatch.setattr(agreement, "MAX_CACHE_BYTES", full["kl_tokens"] * 260 * 4 // 3)
    run(verify, project, monkeypatch)
    third = results(project)
    assert full["kl_tokens"] / 5 < third["kl_tokens"] < full["kl_tokens"] / 2
    assert third["merged_perplexity"] == full["merged_perplexity"]
    assert third["token_agreement"] == full["token_agreement"]


def test_other_base_is_scored_as_if_it_had_been_merged(project, monkeypatch):
    run(verify, project, monkeypatch)
    other = results(project)
    run(merge, project, monkeypatch, merge={"base": "original"})
    run(verify, project, monkeypatch, merge={"base": "original"})
    found = results(project)
    assert found["merged_perplexity"] == other["other_base_perplexity"]
    assert found["mean_kl"] == other["other_base_mean_kl"]
    assert found["other_base_perplexity"] == other["merged_perplexity"]
    run(verify, project, monkeypatch, merge={"base": "original"}, verify={"compare_bases": False})
    assert "other_base_mean_kl" not in results(project)


def test_models_that_do_not_fit_give_the_same_figures_and_merge_each_tensor_once(
    project, monkeypatch
):
    """In several batches of a few rows."""
    merged, passes = Counter(), []
    merge_onto, last_hidden_states = verify.merge_onto, scoring.last_hidden_states

    def counted(*arguments):
        weight_of = merge_onto(*arguments)

        def count(name, stored):
            merged[name] += 1
            return weight_of(name, stored)

        return count

    def noted(causal, batches, streamer):
        passes.append((len(batches), streamer))
        return last_hidden_states(causal, batches, streamer)

    monkeypatch.setattr(streaming, "SMALLEST", 1024)
    monkeypatch.setattr(verify, "merge_onto", counted)
    monkeypatch.setattr(scoring, "last_hidden_states", noted)
    batches = scoring.length_batches
    monkeypatch.setattr(scoring, "length_batches", lambda rows, _: batches(rows, 64))
    found = []
    for free in (100e9, 1e8):
        monkeypatch.setattr(scored_model, "available_bytes", lambda free=free: free)
        run(verify, project, monkeypatch)
        found.append((project / "metrics/verify.json").read_bytes())
    assert found[0] == found[1]
    # Reference, merged model and the other merge, of a resident base and of a streamed one.
    assert [streamer is None for _, streamer in passes] == [True, False, False, False, False, False]
    assert {count > 1 for count, _ in passes} == {True}
    layers = passes[-1][1].count
    # The reference's weights are streamed a second time to be compared with the merge's.
    assert [s.sent / layers for _, s in passes if s] == [1, 1, 2, 1, 1]
    assert set(merged.values()) == {2}, "once in each of the two runs"


def test_a_16_bit_base_and_an_adapter_without_sums(tmp_path, monkeypatch, capsys):
    make_prepared(make_sources(tmp_path, nf4=False))
    (tmp_path / "models/adapter" / SUMS).unlink()
    run(merge, tmp_path, monkeypatch)
    run(verify, tmp_path, monkeypatch)
    assert "other_base_mean_kl" not in results(tmp_path)
    assert results(tmp_path)["mean_kl"] < 1e-6
    assert capsys.readouterr().out.count("no SHA256SUMS: taken as it is") == 2


def test_kl_is_that_of_the_reference_to_the_model(project, monkeypatch):
    """On a damaged model, where the other direction has another value."""
    monkeypatch.chdir(project)
    rows = verify.read_rows(verify.held_out_sets()[""])
    model = verify.load_adapter(load_base(verify.QUANTIZED, torch.device("cpu")), verify.ADAPTER)
    spoiled = AutoModelForCausalLM.from_pretrained(verify.MERGED, dtype=torch.float32)
    spoiled.model.norm.weight.data *= 30
    with tempfile.TemporaryFile() as cache:
        reference = agreement.reference(model, rows, cache)
        found = agreement.agreement(spoiled, rows, reference)
    directions = [], []
    for row in rows:
        ids, scored = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:]) >= 0
        with torch.no_grad():
            p, q = (
                m(ids).logits[0, :-1][scored].double().log_softmax(-1) for m in (model, spoiled)
            )
        directions[0].append((p.exp() * (p - q)).sum(-1))
        directions[1].append((q.exp() * (q - p)).sum(-1))
    right, wrong = (float(torch.cat(each).mean()) for each in directions)
    assert abs(wrong / right - 1) > 0.01
    assert found.mean_kl == pytest.approx(right, rel=1e-4)


def test_one_tensor_is_compared_at_a_time(project, monkeypatch):
    """Nothing of another tensor, nor of this one, is in memory while PEFT computes an update, which
    takes twice its size in float32: on a card of 6 GB there was no room for more."""
    read, computed, alive = Weights.read, Linear4bit.get_delta_weight, WeakValueDictionary()
    seen = []

    def noted(self, name):
        tensor = read(self, name)
        if self.folder.name == "merged":
            alive[name] = tensor
        return tensor

    def compute(self, adapter):
        seen.append(sorted(alive))
        return computed(self, adapter)

    monkeypatch.setattr(Weights, "read", noted)
    monkeypatch.setattr(Linear4bit, "get_delta_weight", compute)
    run(verify, project, monkeypatch)
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("values", [2**24, 64, 1])
def test_a_tensor_is_compared_some_rows_at_a_time(values, monkeypatch):
    monkeypatch.setattr(tensor_check, "BLOCK_VALUES", values)
    for shape in ((40, 8), (3, 5, 8), (7,), ()):
        expected = torch.ones(shape, dtype=torch.bfloat16)
        assert tensor_check.difference(expected.clone(), expected, expected) is None
        found = expected.clone()
        found.view(-1)[-1] = 2
        said = tensor_check.difference(found, expected, expected)
        assert said == f"1 of {found.numel()} values differ"
        found.view(-1)[0] = torch.nan
        assert "1 values are NaN" in tensor_check.difference(found, expected, expected)


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor(torch.nan),
        torch.tensor([0.0, -0.0]),
        torch.tensor([True, False]),
        torch.arange(3),
    ],
    ids=str,
)
def test_copies_are_compared_bit_by_bit(values, tmp_path):
    changed = values.clone().reshape(-1)
    changed[0] = -changed[0] if values.is_floating_point() else not changed[0]
    contents = {"base": values, "same": values, "other": changed.view(values.shape)}
    for name, tensor in contents.items():
        (tmp_path / name).mkdir()
        save_file({"mask": tensor}, tmp_path / name / SINGLE)
    base, same, other = (Weights(tmp_path / name) for name in contents)
    model = SimpleNamespace(get_base_model=lambda: torch.nn.Module())
    own = model, base, base, torch.bfloat16, torch.device("cpu")
    tensor_check.check_tensors(same, *own, copied={"mask"})
    with pytest.raises(StageError, match=r"mask \(a copy that differs from the base\); merge it"):
        tensor_check.check_tensors(other, *own, copied={"mask"})
