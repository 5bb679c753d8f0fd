"""The metrics of a held-out set, and answers to prompts of unlike length."""

import math
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from quick import Stage
from tiny import make_model, make_tokenizer
from transformers import GenerationConfig

from stages.evaluate import answers, check_numbers, interval, samples, set_metrics
from stages.quantize import quantize
from stages.shared.model import load_base
from stages.shared.process import StageError
from stages.shared.rows import set_sha256
from stages.shared.scoring import Scores

CPU = torch.device("cpu")
PROMPTS = ("List the boxes", "Show", "Where is item 3 of box 2?")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    make_model(folder / "base")
    tokenizer = make_tokenizer(folder / "base")
    (folder / "nf4").mkdir()
    quantize(folder / "base", folder / "nf4", double_quant=True)
    config = LoraConfig(r=4, target_modules="all-linear")
    model = get_peft_model(load_base(folder / "nf4", CPU), config).eval()
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    return model, tokenizer


def rows_of(tokenizer):
    rows = []
    for i, prompt in enumerate(PROMPTS):
        asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = [*asked, *tokenizer("ok", add_special_tokens=False)["input_ids"], 2]
        labels = [-100] * len(asked) + ids[len(asked) :]
        rows.append({"row": f"rows.jsonl:{i + 1}", "input_ids": ids, "labels": labels})
        rows[-1] |= {"prompt_tokens": len(asked), "scored_bytes": 2}
    return rows


def test_metrics_follow_their_definitions():
    rows = [{"input_ids": [1, 2], "labels": [-100, 2], "scored_bytes": b} for b in (3, 5)]
    base, better = Scores([4.0, 8.0], [2, 4]), Scores([1.0, 2.0], [2, 4])
    metrics = set_metrics("group_", rows, base, better)
    assert metrics["group_base_perplexity"] == pytest.approx(math.exp(2.0))
    assert metrics["group_tuned_perplexity"] == pytest.approx(math.exp(0.5))
    assert metrics["group_base_bits_per_byte"] == pytest.approx(12 / math.log(2) / 8)
    assert metrics["group_eval_tokens"] == 6
    assert metrics["group_eval_set_sha256"] == set_sha256(rows)


def test_the_interval_holds_the_perplexity_and_repeats():
    scores = Scores([float(i % 7) for i in range(60)], [3] * 60)
    low, high = interval(scores)
    assert low < scores.perplexity < high
    assert interval(scores) == (low, high)


def test_padding_on_the_left_does_not_change_an_answer(tuned):
    model, tokenizer = tuned
    rows = rows_of(tokenizer)
    together = answers(model, tokenizer, rows, [2])
    assert together == [answers(model, tokenizer, [row], [2])[0] for row in rows]


# What a base's generation_config.json may say: some change greedy answers, some cannot be obeyed.
SETTINGS = [
    {"num_beams": 4},
    {"repetition_penalty": 5.0},
    {"no_repeat_ngram_size": 2},
    {"forced_eos_token_id": 3},
    {"max_time": 1e-9},
    {"stop_strings": ["a"]},
    {"token_healing": True},
    {"return_dict_in_generate": True},
    {"dola_layers": "high"},
    {"num_beams": 2, "num_beam_groups": 2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "+".join(settings))
def test_answers_are_greedy_whatever_the_base_asks_for(tuned, monkeypatch, settings):
    model, tokenizer = tuned
    rows = rows_of(tokenizer)
    expected = answers(model, tokenizer, rows, [2])
    of_base = GenerationConfig(eos_token_id=7, **settings)
    monkeypatch.setattr(model.get_base_model(), "generation_config", of_base)
    assert answers(model, tokenizer, rows, [2]) == expected


def test_a_loss_that_is_no_number_names_its_row():
    rows = [{"row": "rows.jsonl:1"}, {"row": "rows.jsonl:2"}]
    check_numbers(Scores([1.0, 2.0], [1, 1]), rows, "the base's", "…")
    for wrong in (math.nan, math.inf):
        with pytest.raises(StageError, match=r"^the base's loss on rows\.jsonl:2 is (nan|inf); …$"):
            check_numbers(Scores([1.0, wrong], [1, 1]), rows, "the base's", "…")


def test_an_enormous_loss_has_a_perplexity():
    scores = Scores([1e6, 1e6], [1, 2])
    assert math.isfinite(scores.perplexity)
    assert all(map(math.isfinite, interval(scores)))


def test_answer_ends_at_each_end_token(tuned):
    model, tokenizer = tuned
    row = rows_of(tokenizer)[0]
    whole = answers(model, tokenizer, [row], [2])[0]
    every = answers(model, tokenizer, [row], list(range(model.config.vocab_size)))[0]
    assert whole.startswith(every)
    assert len(every) < len(whole)


def test_samples_answer_the_same_prompts_by_base_and_tuned(tuned):
    model, tokenizer = tuned
    rows = rows_of(tokenizer)
    promptless = rows[0] | {"prompt_tokens": 0}
    found = samples(model, tokenizer, {"": [promptless, *rows], "group_": rows[1:]}, 3, [2])
    assert [s["prompt"] for s in found] == [PROMPTS[0], PROMPTS[1], PROMPTS[2]]
    assert [s["set"] for s in found] == ["held-out row", "held-out group", "held-out group"]
    assert all(s["reference"] == "ok" for s in found)
    assert any(s["base"] != s["tuned"] for s in found)
    assert samples(model, tokenizer, {"": rows}, 0, [2]) == []


def test_an_adapter_of_no_numbers_is_one_line(finished, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(finished, project, symlinks=True)
    before = {str(file): file.read_bytes() for file in (project / "metrics").iterdir()}
    code = project / "stages/shared/scoring.py"
    scoring = code.read_text()
    code.write_text(scoring.replace("nll[row] += loss", "nll[row] += math.nan"))
    stage = Stage("evaluate", project)
    assert stage.wait() == 1
    assert stage.said.splitlines()[-1].startswith("evaluate: the base's loss on rows.jsonl:")
    assert "Traceback" not in stage.said
    assert {str(file): file.read_bytes() for file in (project / "metrics").iterdir()} == before


def test_running_out_of_memory_is_one_line(finished, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(finished, project, symlinks=True)
    before = {str(file): file.read_bytes() for file in (project / "metrics").iterdir()}
    code = project / "stages/shared/scoring.py"
    raising = "def score(*args, **kwargs):\n    raise torch.cuda.OutOfMemoryError('CUDA')\n"
    code.write_text(code.read_text() + "\n\n" + raising)
    stage = Stage("evaluate", project)
    assert stage.wait() == 1
    last = stage.said.splitlines()[-1]
    assert last.startswith("evaluate: out of GPU memory with 0.00 GB allocated (base model 0.00")
    assert "Traceback" not in stage.said
    after = {str(file): file.read_bytes() for file in (project / "metrics").iterdir()}
    assert after == before
