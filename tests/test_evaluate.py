"""The metrics of a held-out set, and answers to prompts of different lengths."""

import math
import random
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from quick import Stage
from tiny import make_model, make_tokenizer
from transformers import GenerationConfig

from stages.evaluate import check_numbers
from stages.evaluating import answers as scoring
from stages.evaluating import measures
from stages.evaluating.answers import answer_metrics, answered, sample, scores_of
from stages.evaluating.bootstrap import p_value
from stages.evaluating.generation import Answer, Resident, _batches, answers
from stages.evaluating.perplexity import perplexity_interval, set_metrics
from stages.quantize import quantize
from stages.shared.model import load_base
from stages.shared.params import STANDARD_MEASURES, Evaluate
from stages.shared.process import StageError
from stages.shared.rows import set_sha256
from stages.shared.scoring import Scores

pytestmark = pytest.mark.slow

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
    low, high = perplexity_interval(scores)
    assert low < scores.perplexity < high
    assert perplexity_interval(scores) == (low, high)


def prompts_of(rows):
    return [row["input_ids"][: row["prompt_tokens"]] for row in rows]


@pytest.mark.parametrize("most", [1, 2**20])
def test_a_batch_does_not_change_an_answer(tuned, monkeypatch, most):
    """Compared with generate, row by row, without padding or batches."""
    model, tokenizer = tuned
    prompts = prompts_of(rows_of(tokenizer))
    monkeypatch.setattr("stages.evaluating.generation._cached_tokens", lambda model: most)
    found = answers(model, tokenizer, prompts, [2], 40)
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        alone = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=40,
            do_sample=False,
            eos_token_id=[2],
        )[0, len(prompt) :].tolist()
        assert answer.ended == (2 in alone)
        alone = alone[: alone.index(2)] if answer.ended else alone
        assert answer.text == tokenizer.decode(alone, skip_special_tokens=True)
        assert answer.tokens == len(alone)


# Settings of a base's generation_config.json: some change greedy answers, some are invalid.
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
    prompts, causal = prompts_of(rows_of(tokenizer)), model.get_base_model()
    expected = answers(model, tokenizer, prompts, [2], 20)
    of_base = GenerationConfig(eos_token_id=7, **settings)
    monkeypatch.setattr(causal, "generation_config", of_base)
    assert answers(model, tokenizer, prompts, [2], 20) == expected
    assert causal.generation_config is of_base


def test_a_loss_that_is_no_number_names_its_row():
    rows = [{"row": "rows.jsonl:1"}, {"row": "rows.jsonl:2"}]
    check_numbers(Scores([1.0, 2.0], [1, 1]), rows, "the base's", "…")
    for wrong in (math.nan, math.inf):
        with pytest.raises(StageError, match=r"^the base's loss on rows\.jsonl:2 is (nan|inf); …$"):
            check_numbers(Scores([1.0, wrong], [1, 1]), rows, "the base's", "…")


def test_an_enormous_loss_has_a_perplexity():
    scores = Scores([1e6, 1e6], [1, 2])
    assert math.isfinite(scores.perplexity)
    assert all(map(math.isfinite, perplexity_interval(scores)))


def test_batches_are_bounded_and_hold_every_prompt_once():
    prompts = [[0] * random.Random(i).randrange(1, 40) for i in range(50)]
    batches = _batches(prompts, Resident(200), 10)
    assert sorted(i for batch in batches for i in batch) == list(range(50))
    assert all(len(b) * (max(len(prompts[i]) for i in b) + 10) <= 200 for b in batches)
    assert 50 / len(batches) > 200 / 50 / 2
    wide = _batches([[0] * 4096] * 9, Resident(2**40), 10)
    assert [len(batch) for batch in wide] == [4, 4, 1]
    assert _batches([[0] * 500], Resident(200), 10) == [[0]]


def test_answer_ends_at_each_end_token_or_at_the_limit(tuned):
    model, tokenizer = tuned
    [prompt] = prompts_of(rows_of(tokenizer)[:1])
    [whole] = answers(model, tokenizer, [prompt], [2], 20)
    [every] = answers(model, tokenizer, [prompt], list(range(model.config.vocab_size)), 20)
    assert (every.tokens, every.ended, every.text) == (0, True, "")
    assert whole.tokens == 20
    assert not whole.ended


def test_the_same_prompts_are_answered_by_base_and_tuned(tuned):
    model, tokenizer = tuned
    rows = rows_of(tokenizer)
    promptless = rows[0] | {"prompt_tokens": 0}
    sets = {"": [promptless, *rows], "group_": rows[1:]}
    asked = Evaluate(samples=3, max_answer_tokens=20, measures=["command_and_flags"])
    found = answered(model, tokenizer, sets, asked, [2])
    lines = [sample(one) for one in found]
    assert [s["prompt"] for s in lines] == list(PROMPTS)
    assert [s["set"] for s in lines] == ["held-out row", "held-out group", "held-out group"]
    assert [one.place for one in found] == [1, 0, 1]
    assert all(s["reference"] == "ok" for s in lines)
    assert any(s["base"] != s["tuned"] for s in lines)
    assert list(lines[0]["tuned_scores"]) == ["command_and_flags", *STANDARD_MEASURES]
    nothing = asked.model_copy(update={"samples": 0})
    assert answered(model, tokenizer, {"": rows}, nothing, [2]) == []
    metrics = answer_metrics(found)
    assert (metrics["answered_rows"], metrics["group_answered_rows"]) == (1, 2)
    for who in ("base", "tuned"):
        tokens = [one.answers[who].tokens for one in found[1:]]
        assert metrics[f"group_{who}_answer_tokens"] == sum(tokens) / 2
    assert not [key for key in metrics if "json" in key]


def test_references_beyond_the_limit_are_counted(tuned, capsys):
    model, tokenizer = tuned
    rows = rows_of(tokenizer)
    for limit, said in ((3, ""), (2, "warning: 3 of 3 references have more than 2 tokens")):
        asked = Evaluate(samples=3, max_answer_tokens=limit, measures=[])
        answered(model, tokenizer, {"": rows}, asked, [2])
        assert capsys.readouterr().out.startswith(said)


def test_no_answers_make_no_metrics():
    assert answer_metrics([]) == {}


def longest_common(a, b):
    """The example of a textbook."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            above = max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else above
    return table[-1][-1]


def test_rouge_l_follows_its_definition():
    draw = random.Random(1)
    for _ in range(200):
        a, b = (draw.choices(["az", "vm", "List", "show"], k=draw.randrange(1, 9)) for _ in "ab")
        same = longest_common([w.lower() for w in a], [w.lower() for w in b])
        precision, recall = same / len(b), same / len(a)
        expected = 2 * precision * recall / (precision + recall) if same else 0
        assert scoring.rouge_l(" ".join(a), ", ".join(b)) == pytest.approx(expected)
    assert scoring.rouge_l("Größe ändern", "größe ändern!") == 1
    assert scoring.rouge_l("a", "") == scoring.rouge_l("--", "--") == 0


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ('{"a": 1}', ' {"b": [2]}\n', 1),
        ('{"a": 1}', '{"a": 1', 0),
        ("[1]", "NaN", 0),
        ("[1]", "[" * 10**5, 0),
        ("az vm list", "{}", None),
        ("12", "12", None),
    ],
)
def test_json_is_asked_of_rows_whose_reference_is_json(reference, answer, expected):
    assert scoring.json_valid(reference, answer) == expected


@pytest.mark.parametrize("empty", ["<think>\n\n</think>\n\n", "<think></think>", "\n</think>\n\n"])
def test_an_empty_thought_is_scored_neither_in_a_reference_nor_in_an_answer(empty, monkeypatch):
    monkeypatch.setattr(
        measures, "mine", lambda *texts: texts[1:] == ('{"n": 1}',) * 2, raising=False
    )
    expected = scores_of("r:1", "p", '{"n": 1}', Answer('{"n": 1}', 9, True), ["mine"])
    assert expected["mine"] == expected["exact_match"] == expected["json_valid"] == 1
    for thought, other in ((empty, ""), ("", empty), (empty, empty)):
        answer = Answer(other + '{"n": 1}', 9, True)
        assert scores_of("r:1", "p", thought + '{"n": 1}', answer, ["mine"]) == expected


def test_a_thought_with_content_is_part_of_an_answer():
    scores = scores_of("r:1", "p", "<think>\nr\n</think>\n\na", Answer("a", 1, True), [])
    assert scores["exact_match"] == 0
    assert scores["rouge_l"] == pytest.approx(2 / 5)
    scores = scores_of("r:1", "p", "a <think></think>", Answer("a", 1, True), [])
    assert scores["exact_match"] == 0


def test_equal_but_for_blanks_is_an_exact_match():
    assert scoring.exact_match("az vm list", " az vm list\n") == 1
    assert scoring.exact_match("az vm list", "az vm  list") == 0
    assert scoring.chrf("az vm list", "az vm list") == pytest.approx(100)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("az vm create --size=s -n mine", 1),
        ("az vm create -n other --size  m", 1),
        ("az vm create --size s", 0.5 + 0.5 * 2 / 3),
        ("az vm update --size s -n mine", 0.5),
        ("az vm create", 0.5),
        ("vm create --name mine", 0),
        ("", 0),
    ],
)
def test_the_default_measure_looks_at_command_and_flags(answer, score):
    reference = "az vm create --size s -n mine"
    assert measures.command_and_flags("Make one", reference, answer) == pytest.approx(score)
    assert measures.command_and_flags("List", "az vm list", "az vm list") == 1


@pytest.mark.parametrize(
    ("body", "line", "reason"),
    [
        ("    return answer.index('x')\n", 2, "ValueError: substring not found"),
        ("    return None\n", 1, "TypeError: float() argument must be a string or a real num"),
        ("    raise SystemExit\n", 2, "SystemExit: "),
        ("    x = 0\n    return float('nan')\n", 1, "returned nan, not a finite number"),
    ],
)
def test_a_fault_in_a_measure_names_row_and_line(body, line, reason, monkeypatch):
    code = "def mine(prompt, reference, answer):\n" + body
    exec(compile(code, measures.__file__, "exec"), vars(measures))
    monkeypatch.setattr(measures, "mine", measures.mine)
    with pytest.raises(StageError) as fault:
        scores_of("rows.jsonl:7", "prompt", "reference", Answer("answer", 1, True), ["mine"])
    said = f"stages/evaluating/measures.py:{line}: mine failed on row rows.jsonl:7: {reason}"
    assert str(fault.value).startswith(said)
    del measures.mine


def test_p_is_small_where_rows_agree_and_large_where_they_do_not():
    assert p_value([]) == p_value([0.0] * 9) == 1
    assert p_value([1.0] * 50) < 0.01
    assert p_value([-1.0] * 50) == p_value([1.0] * 50)
    assert p_value([1.0, -1.0] * 25) > 0.5
    # Three rows are too few for a small p, even if all agree.
    assert p_value([1.0, 2.0, 3.0]) == 0.25


def test_p_follows_the_normal_approximation():
    draw = random.Random(3)
    for shift in (0.1, 0.2, 0.3):
        values = [draw.gauss(shift, 1) for _ in range(200)]
        mean = sum(values) / 200
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values)) / 200
        normal = math.erfc(abs(mean) / deviation / math.sqrt(2))
        assert p_value(values) == pytest.approx(normal, rel=0.3, abs=0.01)


def test_standard_measures_are_what_the_schema_keeps_from_users():
    scores = scores_of("r:1", "p", "[1]", Answer("[1]", 1, True), [])
    assert tuple(scores) == STANDARD_MEASURES
    assert None not in scores.values()


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
