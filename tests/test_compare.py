"""tools.compare over real revisions, and the noise by which it weighs changes."""

import json
import re
from contextlib import chdir

import pytest
import stub_pipeline as stub
from markdown_it import MarkdownIt
from stub_pipeline import edit, must, tool

from tools.compare import change, comparison, metric_rows, verdict
from tools.noise import RESULT, conditions, spread
from tools.revision import Revision


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return stub.make(tmp_path_factory.mktemp("compare"))


@pytest.fixture(scope="module")
def compared(repository):
    """A comparison with main of an uncommitted workspace in which much has changed."""
    stub.branch(
        repository,
        "changed",
        params_yaml=("tuned: 12.0, group: 14.0", "tuned: 11.0, group: 14.001"),
        evaluate_py=('"token_agreement": 0.999', '"token_agreement": 0.99'),
    )
    edit(repository / "params.yaml", "seconds: 100.0", "seconds: 300.0")
    edit(repository / "params.yaml", "note: a | b", "note: <b>[x](y)</b>")
    must(repository, "dvc", "repro", "-q")
    write_noise(repository)
    return tool(repository, "compare", "--base", "main").stdout


def write_noise(repository):
    """noise.json as on main: 0.1 % for the groups, and more for times."""
    with chdir(repository):
        measured_on = conditions(Revision("main")).model_dump()
    noise = {
        "metrics/eval.json": {"group_tuned_perplexity": {"noise_percent": 0.1}},
        "metrics/train_cost.json": {"train_seconds": {"noise_percent": 500}},
    }
    (repository / RESULT).parent.mkdir(parents=True)
    content = NOISE | {"measured_on": measured_on, "metrics": noise}
    (repository / RESULT).write_text(json.dumps(content))


def test_quality_stands_first_and_cost_last(compared):
    rows = [line for line in compared.splitlines() if line.startswith("| `")]
    assert rows[:4] == [
        "| `eval: tuned_perplexity` | 12 | 11 | -8.33 % | better |",
        r"| `eval: group_tuned_perplexity` | 14 | 14.001 | +0.01 % | within noise |",
        "| `verify: token_agreement` | 0.999 | 0.99 | -0.90 % | worse |",
        "| `train_cost: train_seconds` | 100 | 300 | +200.00 % | within noise |",
    ]
    assert "with the parameters of main: 3 seeds at 0123456789 on CPU." in compared


def texts(name, noise=None, **changes):
    """A revision of a project with model, data and a setting; `changes` of params and metrics."""
    params = {
        "seed": 42,
        "model": {"id": "tiny", "revision": "1"},
        "dataset": {"id": "rows", "revision": None},
        "lora": {"r": 16},
        "plan": {"vram_limit_gb": None},
    }
    metrics = {
        "data": {"train_tokens": 100},
        "train": {"train_loss": 2.0},
        "eval": {"tuned_perplexity": 12.0, "eval_set_sha256": "aaaa"},
        "train_cost": {"device": "CPU", "train_seconds": 10.0},
    }
    for key, values in changes.items():
        (metrics if key in metrics else params).setdefault(key, {}).update(values)
    declared = [{f"metrics/{key}.json": {"cache": False}} for key in metrics]
    files = {
        "params.yaml": json.dumps(params),
        "dvc.yaml": json.dumps({"stages": {"all": {"cmd": "true", "metrics": declared}}}),
    }
    files |= {f"metrics/{key}.json": json.dumps(values) for key, values in metrics.items()}
    return stub.Texts(name, files | ({str(RESULT): json.dumps(noise)} if noise else {}))


BETTER = {
    "train": {"train_loss": 1.9},
    "eval": {"tuned_perplexity": 11.9},
    "train_cost": {"train_seconds": 9.0},
}
NOISE = {
    "commit": "0123456789abcdef",
    "device": "CPU",
    "seeds": [42, 1, 2],
    "measured_on": conditions(texts("measured")).model_dump(),
    "metrics": {
        "metrics/train.json": {"train_loss": {"noise_percent": 50.0}},
        "metrics/eval.json": {"tuned_perplexity": {"noise_percent": 50.0}},
        "metrics/train_cost.json": {"train_seconds": {"noise_percent": 50}},
    },
}
ALL, NONE = 3, 0


@pytest.mark.parametrize(
    ("base", "now", "within", "said"),
    [
        (
            {},
            {},
            ALL,
            "measured on tiny 1 and rows with the parameters of main: 3 seeds at 0123456789",
        ),
        # What is under test.
        ({}, {"lora": {"r": 64}}, ALL, "with the parameters of main"),
        ({"lora": {"r": 64}}, {}, NONE, "but main has other values of lora.r. Measure yours"),
        ({"lora": {"new": 2}}, {}, NONE, "but main has other values of lora.new."),
        ({"model": {"id": "mine"}}, {}, NONE, "tiny 1 and rows with the parameters of 0123456789,"),
        ({}, {"model": {"id": "mine"}}, NONE, "but the workspace has other values of model.id."),
        (
            {"data": {"train_tokens": 9}},
            {"data": {"train_tokens": 9}},
            NONE,
            r"of data.train\_tokens.",
        ),
        ({"eval": {"eval_set_sha256": "b"}}, {}, NONE, r"values of eval.eval\_set\_sha256."),
        # Metrics that decide no result, and metrics added since.
        ({"plan": {"vram_limit_gb": 8}}, {}, ALL, "Within noise"),
        ({"data": {"more": 1}}, {"data": {"more": 1}}, ALL, "Within noise"),
        (
            {"train_cost": {"device": "H200"}},
            {},
            2,
            "Costs are not judged, since that was another device",
        ),
    ],
)
def test_noise_is_spoken_of_where_it_was_measured(base, now, within, said):
    now = {key: BETTER.get(key, {}) | now.get(key, {}) for key in [*BETTER, *now]}
    text = comparison(texts("main", **base), texts("the workspace", NOISE, **now))
    assert text.count("| within noise |") == within
    assert said in text


def test_noise_that_does_not_say_what_it_was_measured_on_is_not_spoken_of():
    old = {key: value for key, value in NOISE.items() if key != "measured_on"}
    text = comparison(texts("main"), texts("now", old, **BETTER))
    assert "within noise" not in text
    assert r"noise.json does not say what it was measured on" in text


@pytest.mark.parametrize(
    "other", [{"eval": {"eval_set_sha256": "b"}}, {"data": {"train_tokens": 101}}]
)
def test_a_loss_of_other_data_is_neither_better_nor_worse(other):
    now = {key: BETTER.get(key, {}) | other.get(key, {}) for key in [*BETTER, *other]}
    text = comparison(texts("main"), texts("now", NOISE, **now))
    assert "| `train: train_loss` | 2 | 1.9 | -5.00 % | not comparable |" in text


def test_the_table_of_cards_and_the_limit_fill_no_comparison(repository):
    """plan.json lists placements for all card sizes; only its plain keys are compared."""
    placed = {"streamed_layers": 1, "predicted_device_gb": 3.5}

    def plan(limit, layers):
        cards = [{"card_gb": 4, "placed": None}, {"card_gb": 8, "placed": placed | layers}]
        return {"predicted_device_gb": 3.0, "vram_limit_gb": limit, "cards": cards}

    before, now = plan(None, {}), plan(24, {"streamed_layers": 32})
    text = comparison(texts("main", train=before), texts("now", train=now))
    assert "No metric changed." in text
    now["predicted_device_gb"] = 2.0
    text = comparison(texts("main", train=before), texts("now", train=now))
    assert [line for line in text.splitlines() if line.startswith("| `")] == [
        "| `train: predicted_device_gb` | 3 | 2 | -33.33 % | better |"
    ]
    # DVC's own tables are as quiet.
    file = repository / "metrics/verify.json"
    kept = file.read_bytes()
    try:
        file.write_text(json.dumps(now))
        shown = json.loads(must(repository, "dvc", "metrics", "show", "--json"))
    finally:
        file.write_bytes(kept)
    [files] = [revision["data"] for revision in shown.values()]
    assert files["metrics/verify.json"]["data"] == {"predicted_device_gb": 2.0, "vram_limit_gb": 24}


HOSTILE = (
    "# H\n\n# [x](http://evil.example) | `<b>` www.evil.example a@evil.example \x1b[31m\u2028# H"
)


def test_no_name_and_no_value_can_make_a_heading_or_a_link():
    measured = {"params": {"model.id": HOSTILE, HOSTILE: 1}, "data": {HOSTILE: HOSTILE}}
    base = texts("main", eval={HOSTILE: 1.0, "x_eval_tokens": HOSTILE})
    now = texts(
        "now",
        NOISE | {"measured_on": measured, "commit": HOSTILE, "device": HOSTILE},
        model={"id": HOSTILE, HOSTILE: 1},
        eval={HOSTILE: HOSTILE, f"{HOSTILE}eval_tokens": 1},
        train_cost={"device": HOSTILE},
    )
    text = comparison(base, now)
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# Compared with main, 6d61696e",
        "## Metrics",
        "## Parameters",
    ]
    assert [c for c in text if not c.isprintable() and c not in "\n\u2060"] == []
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    pieces = [child for token in tokens for child in token.children or []]
    assert {child.type for child in pieces} == {"text", "code_inline"}
    # GitHub turns bare addresses into links unless they are code.
    [said] = [line for line in text.splitlines() if line.startswith("The noise is unknown")]
    assert "evil" in said
    assert not re.search(r"(?<!\\)://|www\.|@\w", said)
    cells = [child.content for child in pieces if child.type == "text"]
    assert len([cell for cell in cells if "evil" in cell]) == 1, "the paragraph alone"


def test_quality_comes_first_whatever_the_order_of_the_stages():
    names = ("data", "train", "train_cost", "eval", "eval_cost", "verify", "summary")
    before = {f"metrics/{name}.json": {"x": 1} for name in names}
    now = {f"metrics/{name}.json": {"x": 2} for name in names}
    rows = [row[0] for row in metric_rows(before, now, {})]
    assert rows == ["eval: x", "verify: x", "train: x", "data: x", "train_cost: x", "eval_cost: x"]


def test_parameters_are_listed_and_escaped(compared):
    assert "| `results.tuned` | 12.0 | 11.0 |" in compared
    assert r"| `train.note` | `a \| b` | `<b>[x](y)</b>` |" in compared
    assert "learning_rate" not in compared


def test_other_evaluation_set_is_not_comparable(repository):
    must(repository, "git", "checkout", "-q", "-f", "main")
    stub.branch(repository, "other-set", params_yaml=("aaaa", "bbbb"))
    edit(repository / "params.yaml", "tuned: 12.0", "tuned: 11.0")
    edit(repository / "evaluate.py", '"token_agreement": 0.999', '"token_agreement": 0.99')
    must(repository, "dvc", "repro", "-q")
    text = tool(repository, "compare", "--base", "main").stdout
    assert "| `eval: tuned_perplexity` | 12 | 11 | -8.33 % | not comparable |" in text
    assert "| `verify: token_agreement` | 0.999 | 0.99 | -0.90 % | not comparable |" in text
    assert "| The evaluation sets differ | main | now |" in text
    assert "| `eval_set_sha256` | `aaaa` | `bbbb` |" in text


def test_nothing_changed(repository):
    must(repository, "git", "checkout", "-q", "-f", "main")
    text = tool(repository, "compare", "--base", "main").stdout
    assert "No metric changed." in text
    assert "No parameter changed." in text


def test_unknown_base_fails_in_one_line(repository):
    done = tool(repository, "compare", "--base", "nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("compare: nowhere is not a revision here")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "before", "now", "noise", "expected"),
    [
        ("tuned_perplexity", 12.0, 11.0, None, "better"),
        ("tuned_perplexity", 12.0, 12.1, 1.0, "within noise"),
        ("tuned_perplexity", 12.0, 12.2, 1.0, "worse"),
        ("perplexity_change_percent", -0.5, 0.1, None, "better"),
        ("perplexity_change_percent", 0.1, -0.5, None, "worse"),
        ("tokens_per_second", 80.0, 90.0, None, "better"),
        ("tokens_per_second", 80.0, 70.0, None, "worse"),
        ("peak_vram_gb", 8.0, 9.0, None, "worse"),
        ("train_examples", 200, 100, None, "changed"),
        ("device", "CPU", "L4", None, "changed"),
        ("tuned_perplexity", None, 11.0, None, "changed"),
        ("tuned_perplexity", 11.0, None, None, "changed"),
        ("tuned_perplexity", 12.0, float("nan"), 1.0, "worse"),
        ("tuned_perplexity", float("nan"), 12.0, 1.0, "changed"),
    ],
)
def test_verdict(key, before, now, noise, expected):
    assert verdict(key, before, now, noise) == expected


@pytest.mark.parametrize(
    ("key", "before", "now", "expected"),
    [
        ("tuned_perplexity", 12.0, 15.0, "+25.00 %"),
        ("mean_kl", 1e-4, 0.2, "x 2,000"),
        ("perplexity_change_percent", -0.05, -1.75, "-1.7 points"),
        ("other_base_mean_kl", 0.2, None, ""),
        ("nonfinite_values", 0, 3, ""),
        ("tuned_perplexity", 12.0, float("nan"), ""),
    ],
)
def test_change_is_one_that_a_person_can_read(key, before, now, expected):
    assert change(key, before, now) == expected


def test_spread_of_three_runs():
    # s = 1, t(2 degrees of freedom) = 4.303, so 4.303 * sqrt(2) / 10 of the mean.
    assert spread([9.0, 10.0, 11.0]) == {
        "values": [9.0, 10.0, 11.0],
        "mean": 10.0,
        "noise_percent": 60.85,
    }


@pytest.mark.slow
def test_noise_repeats_the_commit_with_other_seeds(repository):
    must(repository, "git", "checkout", "-q", "-f", "main")
    must(repository, "dvc", "checkout", "-q")
    # Left by an interrupted measurement of another commit.
    old = f"refs/exps/00/{'0' * 38}/noise-142"
    must(repository, "git", "update-ref", old, "no-metrics")
    assert tool(repository, "noise", "--seeds", "142", "242").returncode == 0
    must(repository, "git", "update-ref", "-d", old)
    result = json.loads((repository / "benchmarks/results/noise.json").read_text())
    assert result["seeds"] == [42, 142, 242]
    assert result["metrics"]["metrics/eval.json"]["tuned_perplexity"]["values"] == [12, 13, 14]
    assert result["metrics"]["metrics/verify.json"] == {}, "what does not vary is no noise"
    assert result["device"] == "CPU"
    assert result["measured_on"]["params"]["train.learning_rate"] == 2.0e-3
    assert result["measured_on"]["data"]["eval.eval_set_sha256"] == "aaaa"
    assert not must(repository, "dvc", "exp", "list", "--name-only").strip()
    assert not must(repository, "git", "status", "--porcelain", "--untracked-files=no")


@pytest.mark.parametrize("seeds", [["42", "1"], ["1"], ["1", "1"]])
def test_noise_refuses_seeds_that_measure_nothing(repository, seeds):
    done = tool(repository, "noise", "--seeds", *seeds)
    assert done.returncode == 2
    assert "give 2 to 9 different seeds other than 42" in done.stderr
