"""Results of lm-evaluation-harness as a metrics file that compare and the gate read."""

import json
import sys

import stub_pipeline as stub
from stub_pipeline import tool

from tools.compare import comparison
from tools.gate import broken_limits
from tools.harness import flat
from tools.revision import HARNESS

RESULTS = {
    "arc_easy": {"acc,none": 0.4567891, "acc_stderr,none": 0.01, "alias": "arc_easy"},
    "words": {"word_perplexity,none": 20.0, "exact_match,strict": 0.5, "x_stderr,none": "N/A"},
}


def test_every_figure_gets_a_key_of_its_own():
    assert flat("tuned", RESULTS) == {
        "tuned_arc_easy_acc": 0.456789,
        "tuned_arc_easy_acc_stderr": 0.01,
        "tuned_words_word_perplexity": 20.0,
        "tuned_words_exact_match_strict": 0.5,
    }


def revision(name, limit=None, **values):
    figures = {"tuned_arc_easy_acc": 0.5, "tuned_words_word_perplexity": 20.0} | values
    texts = {HARNESS: json.dumps(figures | {"limit": limit}), "dvc.yaml": "{}", "params.yaml": "{}"}
    return stub.Texts(name, texts)


def test_compare_and_gate_read_it():
    now = revision("now", tuned_arc_easy_acc=0.4, tuned_words_word_perplexity=19.0)
    text = comparison(revision("main"), now)
    assert "| `harness: tuned_arc_easy_acc` | 0.5 | 0.4 | -20.00 % | worse |" in text
    assert "| `harness: tuned_words_word_perplexity` | 20 | 19 | -5.00 % | better |" in text
    limits = {HARNESS: {"tuned_arc_easy_acc": {"may_fall_percent": 5}}}
    [line] = broken_limits(limits, revision("main").metrics, now.metrics)
    assert line.startswith(f"{HARNESS}: tuned_arc_easy_acc fell by 20.00 %")


def test_other_examples_are_not_comparable():
    text = comparison(revision("main"), revision("now", limit=10, tuned_arc_easy_acc=0.4))
    assert "| 0.5 | 0.4 | -20.00 % | not comparable |" in text


def test_without_the_library_it_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = tool(tmp_path, "harness", "--tasks", "arc_easy")
    assert done.returncode == 2
    assert done.stderr == (
        'harness: lm-evaluation-harness is not installed; run it as: make harness TASKS="…"\n'
    )
