"""The gate's rules, line by line, on revisions given as texts, without a repository."""

import hashlib
import json
import math
import sys

import pytest
import stub_pipeline as stub

from stages.shared.process import StageError
from tools import gate
from tools.gate import broken, broken_limits, edited, is_number, judge, not_finite, unequal_sets
from tools.paired import Paired

EVAL, VERIFY = "metrics/eval.json", "metrics/verify.json"
SAME = {"tuned_perplexity": 12.0, "eval_tokens": 4211, "eval_set_sha256": "aaaa"}
GATE = f"{EVAL}: {{tuned_perplexity: {{may_rise_percent: 10}}}}"
FILES = {
    "gate.yaml": GATE,
    "params.yaml": "seed: 1\nlora: {r: 16}",
    "evaluate.py": "code",
    "merge.py": "code of merge",
    "templates/chat": "{prompt}",
    EVAL: json.dumps(SAME),
    "plot.csv": "step,loss",
}
STAGES = {
    "evaluate": {
        "cmd": "evaluate",
        "deps": ["evaluate.py", "templates"],
        "params": ["seed", "lora"],
        "outs": ["adapter"],
        "metrics": [{EVAL: {"cache": False}}],
        "plots": ["plot.csv"],
    },
    "merge": {"cmd": "merge", "deps": ["merge.py", "adapter"], "outs": ["merged"]},
}


def md5(text):
    return hashlib.md5(text.encode()).hexdigest()


# Of folders, which a commit does not hold.
FOLDERS = {name: md5(name) for name in ("adapter", "merged", "templates")}


def locked(texts, stages=STAGES):
    """dvc.lock after a run on `texts`."""

    def stored(paths):
        paths = [path if isinstance(path, str) else next(iter(path)) for path in paths]
        return [{"path": path, "md5": FOLDERS.get(path) or md5(texts[path])} for path in paths]

    params = {"seed": 1, "lora": {"r": 16}}
    return {
        name: {
            "cmd": stage["cmd"],
            "deps": stored(stage["deps"]),
            "outs": stored([*stage["outs"], *stage.get("metrics", []), *stage.get("plots", [])]),
        }
        | ({"params": {"params.yaml": params}} if "params" in stage else {})
        for name, stage in stages.items()
    }


def revision(name, run=None, then=None, lock=None, stages=STAGES):
    """A commit: files that were there when all ran, those edited `then`, and edits of the lock."""
    texts = FILES | (run or {})
    stored = locked({path: text for path, text in texts.items() if text is not None})
    if lock:
        lock(stored)
    texts |= {
        "dvc.yaml": json.dumps({"stages": stages}),
        "dvc.lock": json.dumps({"stages": stored}),
    }
    texts |= then or {}
    return stub.Texts(name, {path: text for path, text in texts.items() if text is not None})


MAIN = revision("main")
PASSED = [
    "notice: metrics are consistent with dvc.lock; only a run can confirm both",
    "gate: passed: 1 metrics within the limits of gate.yaml",
]


def scored(**values):
    return {EVAL: json.dumps(SAME | values)}


def test_what_passes():
    assert judge(MAIN, revision("HEAD")) == (0, PASSED)
    assert judge(MAIN, revision("HEAD", scored(tuned_perplexity=13.2))) == (0, PASSED)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"unlimited": math.inf}, "unlimited is inf"),
        ({"tuned_perplexity": "12.0"}, "tuned_perplexity is not a number ('12.0')"),
        ({"tuned_perplexity": None}, "tuned_perplexity is missing"),
    ],
)
def test_metrics_that_no_run_should_give(values, said):
    assert judge(MAIN, revision("HEAD", scored(**values))) == (
        1,
        [f"broken: {EVAL}: {said}", "gate: FAILED: 1 broken"],
    )


def test_limits_are_those_of_the_base():
    loose = GATE.replace("10", "500")
    worse = revision("HEAD", scored(tuned_perplexity=24.0), {"gate.yaml": loose})
    line = f"{EVAL}: tuned_perplexity rose by 100.00 %, from 12 to 24; 10 % is allowed"
    assert judge(MAIN, worse) == (1, [f"broken: {line}", "gate: FAILED: 1 broken"])
    without = revision("old", {"gate.yaml": None})
    notice = "notice: no gate.yaml at old; the limits are HEAD's own"
    assert judge(without, worse) == (0, [notice, *PASSED])
    with pytest.raises(StageError) as fault:
        judge(without, revision("HEAD", {"gate.yaml": None}))
    assert str(fault.value) == "gate.yaml: no limits, neither at old nor at HEAD; add some"


def test_a_base_without_metrics():
    new = revision("new", then={EVAL: None})
    notice = f"notice: new has no {EVAL} yet; there is nothing to compare with"
    neither = "gate: passed: neither revision has metrics"
    assert judge(new, revision("HEAD", then={EVAL: None})) == (0, [notice, neither])
    assert judge(new, revision("HEAD", scored(tuned_perplexity=99.0))) == (0, [notice, *PASSED])
    status, lines = judge(new, revision("HEAD", scored(tuned_perplexity=math.nan)))
    broke = f"broken: {EVAL}: tuned_perplexity is nan"
    assert (status, lines) == (1, [notice, broke, "gate: FAILED: 1 broken"])


def test_other_evaluation_sets_are_not_compared():
    assert judge(MAIN, revision("HEAD", scored(eval_tokens=5, eval_set_sha256="b"))) == (
        2,
        [
            f"not comparable: {EVAL}: eval_tokens is 5, but 4211 at the base",
            f"not comparable: {EVAL}: eval_set_sha256 is b, but aaaa at the base",
            "gate: FAILED: the evaluation sets differ",
        ],
    )


def test_metrics_that_are_gone_are_not_comparable():
    stages = STAGES | {"evaluate": STAGES["evaluate"] | {"metrics": []}}
    stored = locked(FILES, stages)
    texts = {"dvc.yaml": json.dumps({"stages": stages}), "dvc.lock": json.dumps({"stages": stored})}
    gone = stub.Texts("HEAD", FILES | texts)
    status, lines = judge(MAIN, gone)
    assert status == 2
    assert lines[0] == f"not comparable: {EVAL}: eval_tokens is None, but 4211 at the base"


def without(name):
    return lambda stored: stored.pop(name)


def entry(stage, kind, number, **values):
    return lambda stored: stored[stage][kind][number].update(values)


OTHER = "0" * 32
INCONSISTENT = {
    f"{EVAL} is not what dvc.lock recorded": {"then": scored(tuned_perplexity=9.0)},
    f"{EVAL} is missing": {"then": {EVAL: None}},
    "plot.csv is not what dvc.lock recorded": {"then": {"plot.csv": "typed"}},
    "stage evaluate ran with another evaluate.py": {"then": {"evaluate.py": "other"}},
    "stage merge ran with another merge.py": {"lock": entry("merge", "deps", 0, md5=OTHER)},
    "stage merge ran with another adapter": {"lock": entry("merge", "deps", 1, md5=OTHER)},
    "stage evaluate ran with another templates": {"then": {"templates/chat": "{answer}"}},
    "stage evaluate ran with another seed in params.yaml": {
        "then": {"params.yaml": "seed: 2\nlora: {r: 16}"}
    },
    "stage evaluate ran with another lora in params.yaml": {"then": {"params.yaml": "seed: 1"}},
    "stage merge has never run: it is not in dvc.lock": {"lock": without("merge")},
    "stage merge ran with other command than dvc.yaml has": {
        "lock": lambda stored: stored["merge"].update(cmd="other")
    },
    "stage merge ran with other deps than dvc.yaml has": {
        "lock": lambda stored: stored["merge"]["deps"].pop(0)
    },
    "stage merge ran with other params than dvc.yaml has": {
        "lock": lambda stored: stored["merge"].update(params={"params.yaml": {"seed": 1}})
    },
    "stage merge ran with other outs than dvc.yaml has": {
        "lock": entry("merge", "outs", 0, path="elsewhere")
    },
}


@pytest.mark.parametrize("line", INCONSISTENT)
def test_what_no_run_gave_is_named(line):
    judged = judge(MAIN, revision("HEAD", **INCONSISTENT[line]))
    assert judged == (
        2,
        [
            f"not consistent: {line}; run dvc repro and commit",
            "gate: FAILED: dvc.lock records different results",
        ],
    )


def test_every_inconsistency_is_said():
    then = {"merge.py": "other", "evaluate.py": "other", "plot.csv": None}
    _, lines = judge(MAIN, revision("HEAD", then=then, lock=entry("merge", "deps", 1, md5=OTHER)))
    assert lines == [
        "not consistent: plot.csv is missing; run dvc repro and commit",
        *(
            f"not consistent: stage {name} ran with another {what}; run dvc repro and commit"
            for name, what in (
                ("evaluate", "evaluate.py"),
                ("merge", "merge.py"),
                ("merge", "adapter"),
            )
        ),
        "gate: FAILED: dvc.lock records different results",
    ]


def test_a_deleted_file_is_another_one():
    _, lines = judge(MAIN, revision("HEAD", then={"merge.py": None}))
    assert lines[0] == (
        "not consistent: stage merge ran with another merge.py; run dvc repro and commit"
    )


def test_rows_that_both_scored_are_paired():
    def rows(nll):
        lines = [f"eval,{i},10,{nll + i % 7}\n" for i in range(60)]
        return {"metrics/rows.csv": "".join(["set,row,tokens,tuned_nll\n", *lines])}

    rule = {"gate.yaml": f"{EVAL}: {{tuned_perplexity: {{no_rise_below_p: 0.01}}}}"}
    main = revision("main", rule | rows(20))
    worse = judge(main, revision("HEAD", rows(21) | scored(tuned_perplexity=13.0)))
    assert worse[0] == 1
    assert "rose from 12 to 13 (p < 0.01, 60 rows, paired)" in worse[1][0]
    assert judge(main, revision("HEAD", rows(20) | scored(tuned_perplexity=13.0)))[0] == 0


def test_a_folder_that_ran_again_is_taken_at_its_word():
    edits = {"templates/chat": "{answer}"}
    again = entry("evaluate", "deps", 1, md5=OTHER)
    assert judge(MAIN, revision("HEAD", edits, lock=again)) == (0, PASSED)
    # Its files are those of before.
    assert judge(MAIN, revision("HEAD", lock=again)) == (0, PASSED)


def test_what_lies_below_a_folder_and_what_beside():
    def texts(**files):
        return stub.Texts("one", {name.replace("__", "/"): text for name, text in files.items()})

    base = texts(data="1", folder__a="1", folder__b__c="1", folder2__a="1")
    assert not edited("folder", base, base)
    assert edited("folder", base, texts(data="1", folder__a="1", folder__b__c="2"))
    assert edited("folder", base, texts(folder__a="1"))
    assert edited("folder", texts(folder__a="1"), base)
    assert edited("folder", base, texts(folder__a="1", folder__b__c="1", folder__new="1"))
    beside = texts(data="2", folder__a="1", folder__b__c="1", folder2__a="2", folder3="1")
    assert not edited("folder", base, beside)
    assert edited("data", base, beside)


@pytest.mark.parametrize(
    ("value", "number"), [(1, True), (0.5, True), (True, False), ("1", False), (None, False)]
)
def test_what_is_a_number(value, number):
    assert is_number(value) is number


PAIR = Paired(0.5, 0.001, 60)
FELL = Paired(-0.5, 0.001, 60)
RULES = [
    ("at_most", 1, None, 2.5, None, "is 2.5; at most 1 is allowed"),
    ("at_least", 1, None, 0.5, None, "is 0.5; at least 1 is required"),
    ("at_most", 1, None, 0.5, None, None),
    ("at_least", 1, None, 2.5, None, None),
    ("may_rise_percent", 10, 2, 3, None, "rose by 50.00 %, from 2 to 3; 10 % is allowed"),
    ("may_fall_percent", 10, 4, 3, None, "fell by 25.00 %, from 4 to 3; 10 % is allowed"),
    ("may_fall_percent", 10, 3, 4, None, None),
    ("may_rise_percent", 10, 4, 3, None, None),
    ("may_rise_percent", 10, -2, -1, None, "rose by 50.00 %, from -2 to -1; 10 % is allowed"),
    ("may_rise_percent", 10, 0, 1, None, "rose by 1 from 0, from 0 to 1; 10 % is allowed"),
    ("may_rise_percent", 10, None, 3, None, None),
    ("may_rise_percent", 10, "2", 3, None, None),
    ("may_rise_percent", 10, math.inf, 3, None, None),
    ("may_fall_percent", 10, math.inf, 3, None, None),
    (
        *("may_rise_percent", 10, 2, 3, PAIR),
        "rose by 50.00 %, from 2 to 3 (p < 0.01, 60 rows, paired); 10 % is allowed",
    ),
    (
        *("no_rise_below_p", 0.01, 2, 3, PAIR),
        "rose from 2 to 3 (p < 0.01, 60 rows, paired); p below 0.01 is not allowed",
    ),
    (
        *("no_fall_below_p", 0.01, 3, 2, FELL),
        "fell from 3 to 2 (p < 0.01, 60 rows, paired); p below 0.01 is not allowed",
    ),
    ("no_rise_below_p", 0.001, 2, 3, PAIR, None),
    ("no_rise_below_p", 0.01, 2, 3, None, None),
    ("no_rise_below_p", 0.01, None, 3, PAIR, None),
    ("no_fall_below_p", 0.01, 2, 3, PAIR, None),
    ("no_rise_below_p", 0.01, 3, 2, FELL, None),
    ("no_rise_below_p", 0.01, 3, 3, PAIR._replace(change=0), None),
]


@pytest.mark.parametrize(("rule", "limit", "before", "now", "pair", "said"), RULES)
def test_what_a_rule_says(rule, limit, before, now, pair, said):
    assert broken(rule, limit, before, now, pair) == said


@pytest.mark.parametrize(
    ("rule", "limit", "before", "reached", "beyond"),
    [
        ("at_most", 1, None, 1.0, 1.0001),
        ("at_least", 0.95, None, 0.95, 0.9499),
        ("at_least", -1, None, -1.0, -1.0001),
        # In binary 15.4 is more than a tenth above 14, and 12.6 more than a tenth below.
        ("may_rise_percent", 10, 14.0, 15.4, 15.4001),
        ("may_rise_percent", 10, 12.0, 13.2, 13.2001),
        ("may_rise_percent", 10, -14.0, -12.6, -12.5999),
        ("may_fall_percent", 10, 14.0, 12.6, 12.5999),
        ("may_fall_percent", 0, 0.3, 0.3, 0.29999),
        ("may_rise_percent", 5, 0, 0, 1e-9),
    ],
)
def test_a_limit_exactly_reached_is_kept(rule, limit, before, reached, beyond):
    assert broken(rule, limit, before, reached) is None
    assert broken(rule, limit, before, beyond)


def test_every_broken_limit_is_said_and_what_is_no_number():
    limits = {
        "a": {
            "gone": {"at_most": 1},
            "text": {"at_most": 1},
            "lost": {"at_least": 3, "may_fall_percent": 10},
            "infinite": {"at_most": 1},
            "kept": {"at_most": 1},
        },
        "b": {"none": {"at_most": 1}},
        "c": {"more": {"at_most": 1}},
    }
    now = {"a": {"text": "x", "lost": 2, "infinite": math.inf, "kept": 1}, "c": {"more": 2}}
    assert broken_limits(limits, {"a": {"lost": 4}}, now) == [
        "a: gone is missing",
        "a: text is not a number ('x')",
        "a: lost is 2; at least 3 is required",
        "a: lost fell by 50.00 %, from 4 to 2; 10 % is allowed",
        "b: none is missing",
        "c: more is 2; at most 1 is allowed",
    ]


def test_pairs_are_asked_for_the_metric():
    class Pairs:
        def of(self, path, key):
            return {("a", "x"): PAIR}.get((path, key))

    limits = {"a": {"x": {"no_rise_below_p": 0.01}, "y": {"no_rise_below_p": 0.01}}}
    values = {"a": {"x": 1.0, "y": 1.0}}
    [line] = broken_limits(limits, values, values, Pairs())
    assert line.startswith("a: x rose from 1 to 1 (p < 0.01, 60 rows, paired)")


def test_what_is_not_finite_and_which_sets_differ():
    values = {"a": {"x": math.nan, "y": 1.0, "z": "text"}, "b": {"x": -math.inf, "y": True}}
    assert not_finite(values) == ["a: x is nan", "b: x is -inf"]
    base = {"group_eval_tokens": 1, "eval_set_sha256": "a", "perplexity": 2.0, "eval_tokens": 3}
    assert unequal_sets(base, base | {"perplexity": 3.0, "more": 1}) == []
    assert unequal_sets(base, {"eval_tokens": 3, "group_eval_tokens": 2}) == [
        "group_eval_tokens",
        "eval_set_sha256",
    ]


class Named(stub.Texts):
    def __init__(self, name):
        super().__init__(name, {})
        self.commit = f"{name}-0123456789"


def told(monkeypatch, capsys, judged, uncommitted=b"", **fault):
    def chosen(base, head):
        assert (base.name, head.name) == ("before", "HEAD")
        if fault:
            raise StageError(fault["fault"])
        return judged

    def asked(*arguments):
        assert arguments == ("status", "--porcelain", "--", "metrics", "dvc.lock", "params.yaml")
        return uncommitted

    monkeypatch.setattr(sys, "argv", ["gate", "--base", "before"])
    monkeypatch.setattr(gate, "Revision", Named)
    monkeypatch.setattr(gate, "judge", chosen)
    monkeypatch.setattr(gate, "git", asked)
    with pytest.raises(SystemExit) as end:
        gate.main()
    out, err = capsys.readouterr()
    return end.value.code, out, err


def test_what_is_printed(monkeypatch, capsys):
    first = "gate: HEAD-01234 against before (before-012)\n"
    assert told(monkeypatch, capsys, (1, ["one", "two\x1b"])) == (1, f"{first}one\ntwo\\x1b\n", "")
    notice = "notice: uncommitted changes are not judged\n"
    said = told(monkeypatch, capsys, (0, ["one"]), b" M metrics/eval.json\n")
    assert said == (0, f"{first}{notice}one\n", "")
    said = told(monkeypatch, capsys, None, fault="no limits")
    assert said == (2, "", "gate: FAILED: no limits\n")


def test_a_base_must_be_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gate"])
    with pytest.raises(SystemExit) as end:
        gate.main()
    assert end.value.code == 2
    assert "--base" in capsys.readouterr().err
