"""Runs compared row by row: pairs, p values, and their use by compare and the gate."""

import json

import pytest
import stub_pipeline as stub

from stages.evaluating.answers import Answered
from stages.evaluating.generation import Answer
from stages.evaluating.row_scores import rows_csv
from stages.shared.process import StageError
from stages.shared.scoring import Scores
from tools.compare import comparison
from tools.gate import broken_limits
from tools.paired import ANSWERS, EVAL, ROWS, Pairs, read_rows

ROW_COUNT = 60


def answered_row(place, right, prefix=""):
    both = {who: Answer("text", 3, True) for who in ("base", "tuned")}
    scores = {"base": {"mine": 0.0, "json_valid": None}, "tuned": {"mine": right}}
    scores["tuned"]["json_valid"] = None
    return Answered(prefix, place, f"r:{place}", "p", "a", both, scores)


def revision(name, shift=0.0, right=lambda i: 0.0, rows=True, answers=30, **evaluation):
    """A run whose tuned model is worse by `shift` nats in most rows; base and rows stay."""
    base = Scores([20.0 + i % 7 for i in range(ROW_COUNT)], [10] * ROW_COUNT)
    luck = [0.5 if i % 3 else -0.5 for i in range(ROW_COUNT)]
    nll = [10.0 + i % 7 + shift * (1 + own) for i, own in enumerate(luck)]
    tuned = Scores(nll, [10] * ROW_COUNT)
    both = {"base": base, "tuned": tuned}
    sets = {"": both, "retention_": both, "source_12_": both}
    found = [answered_row(i, right(i)) for i in range(answers)]
    means = {
        "tuned_perplexity": tuned.perplexity,
        "source_12_tuned_perplexity": tuned.perplexity,
        "retention_perplexity_change_percent": 100 * (tuned.perplexity / base.perplexity - 1),
        "eval_set_sha256": "aaaa",
    }
    mine = sum(one.scores["tuned"]["mine"] for one in found) / answers
    declared = [{path: {"cache": False}} for path in (EVAL, ANSWERS)]
    texts = {
        "params.yaml": "seed: 1",
        "dvc.yaml": json.dumps({"stages": {"evaluate": {"metrics": declared}}}),
        EVAL: json.dumps(means | evaluation),
        ANSWERS: json.dumps({"answered_rows": answers, "tuned_mine": mine}),
    }
    return stub.Texts(name, texts | ({ROWS: rows_csv(sets, found)} if rows else {}))


def marks(before, now):
    lines = comparison(before, now).splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| `")]
    return {cell[0].strip("`"): cell[-1].replace("\\<", "<") for cell in cells}


def test_a_small_change_of_nearly_every_row_is_no_noise():
    found = marks(revision("main"), revision("now", -0.2))
    assert found["eval: tuned_perplexity"] == "better, p < 0.01, 60 rows"
    assert found["eval: retention_perplexity_change_percent"] == "better, p < 0.01, 60 rows"
    assert found["eval: source_12_tuned_perplexity"] == "better, p < 0.01, 60 rows"
    found = marks(revision("main"), revision("now", 0.2))
    assert found["eval: tuned_perplexity"] == "worse, p < 0.01, 60 rows"


def test_one_row_of_sixty_is_noise():
    before, now = revision("main"), revision("now", right=lambda i: float(i == 3))
    assert marks(before, now) == {"answers: tuned_mine": "within noise, p = 1, 30 rows"}
    said = comparison(before, now)
    assert "by the choice of rows alone" in said
    assert said.index("answers: tuned_mine") < said.index("p is from a paired bootstrap")


def test_of_a_users_own_measure_more_is_better():
    better = revision("now", right=lambda i: float(i % 2))
    assert marks(revision("main"), better)["answers: tuned_mine"] == "better, p < 0.01, 30 rows"
    assert marks(better, revision("main"))["answers: tuned_mine"] == "worse, p < 0.01, 30 rows"


def test_only_rows_that_both_answered_count():
    fewer = revision("now", right=lambda i: 1.0, answers=20)
    found = marks(revision("main"), fewer)
    assert found["answers: tuned_mine"] == "better, p < 0.01, 20 rows"
    assert found["answers: answered_rows"] == "changed"


def test_without_rows_nothing_is_paired():
    before = revision("main", rows=False)
    assert marks(before, revision("now", -0.2))["eval: tuned_perplexity"] == "better"
    fewer = revision("now", right=lambda i: 1.0, answers=20)
    assert marks(before, fewer)["answers: tuned_mine"] == "not comparable"


def test_other_rows_are_never_paired():
    other = revision("now", -0.2, eval_set_sha256="bbbb")
    assert marks(revision("main"), other)["eval: tuned_perplexity"] == "not comparable"
    longer = revision("now", -0.2)
    longer.texts[ROWS] = longer.texts[ROWS].replace(",10,", ",11,")
    assert Pairs(revision("main"), longer).of(EVAL, "tuned_perplexity") is None


def test_rows_that_json_was_not_asked_of_have_no_score():
    scores = read_rows(revision("main"))[("eval", "0")]
    assert scores["tuned_mine"] == 0
    assert "tuned_json_valid" not in scores
    assert "tuned_mine" not in read_rows(revision("main"))[("retention", "0")]


def judged(rules, before, now):
    pairs = Pairs(before, now)
    return broken_limits(rules, before.metrics, now.metrics, pairs)


def test_the_gate_tells_a_loss_from_luck():
    rules = {ANSWERS: {"tuned_mine": {"no_fall_below_p": 0.01}}}
    all_right = revision("main", right=lambda i: 1.0)
    assert judged(rules, all_right, revision("now", right=lambda i: float(i != 3))) == []
    [line] = judged(rules, all_right, revision("now", right=lambda i: float(i % 2)))
    assert line == (
        f"{ANSWERS}: tuned_mine fell from 1 to 0.5 (p < 0.01, 30 rows, paired); "
        "p below 0.01 is not allowed"
    )
    assert judged(rules, revision("main"), all_right) == [], "it rose"
    rising = {EVAL: {"tuned_perplexity": {"no_rise_below_p": 0.01}}}
    assert len(judged(rising, revision("main"), revision("now", 0.2))) == 1
    assert judged(rising, revision("main"), revision("now", -0.2)) == []
    assert judged(rising, revision("main", rows=False), revision("now", 0.2)) == []


def test_a_broken_limit_says_how_sure_it_is():
    rules = {EVAL: {"tuned_perplexity": {"may_rise_percent": 1}}}
    [line] = judged(rules, revision("main"), revision("now", 1.0))
    assert "(p < 0.01, 60 rows, paired); 1 % is allowed" in line


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("set,row,tokens\neval,0,ten\n", ":2: malformed row (could not convert string"),
        ("set,row,tokens\neval,0,nan\n", ":2: malformed row (nan is not finite)"),
        ("set,row,tokens\neval,0,1\neval,1,2,3\n", ":3: malformed row"),
        ("eval,0,1\neval,1,2\n", ":2: malformed row ('set')"),
        ('set,row,tokens\neval,"0,1\n', ":1: malformed row (unexpected end of data)"),
    ],
)
def test_what_are_no_scores_is_one_line(content, said):
    run = revision("main")
    run.texts[ROWS] = content
    with pytest.raises(StageError) as fault:
        read_rows(run)
    assert str(fault.value).startswith(f"main:{ROWS}{said}")
    assert str(fault.value).endswith("; run evaluate again")
