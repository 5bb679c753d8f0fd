"""The comparison over real revisions, and the noise it weighs changes by."""

import json

import pytest
import stub_pipeline as stub
from stub_pipeline import edit, must, tool

from tools.compare import change, metric_rows, verdict
from tools.noise import spread


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return stub.make(tmp_path_factory.mktemp("compare"))


@pytest.fixture(scope="module")
def compared(repository):
    """The comparison with main of a workspace, not committed, where much has changed."""
    stub.branch(
        repository,
        "changed",
        params_yaml=("tuned: 12.0, group: 14.0", "tuned: 11.0, group: 14.001"),
        evaluate_py=('"token_agreement": 0.999', '"token_agreement": 0.99'),
    )
    edit(repository / "params.yaml", "seconds: 100.0", "seconds: 300.0")
    edit(repository / "params.yaml", "note: a | b", "note: <b>[x](y)</b>")
    must(repository, "dvc", "repro", "-q")
    noise = {"metrics/eval.json": {"group_tuned_perplexity": {"noise_percent": 0.1}}}
    (repository / "benchmarks/results").mkdir(parents=True)
    (repository / "benchmarks/results/noise.json").write_text(json.dumps({"metrics": noise}))
    return tool(repository, "compare", "--base", "main").stdout


def test_quality_stands_first_and_cost_last(compared):
    rows = [line for line in compared.splitlines() if line.startswith("| `")]
    assert rows[:4] == [
        "| `eval: tuned_perplexity` | 12 | 11 | -8.33 % | better |",
        r"| `eval: group_tuned_perplexity` | 14 | 14.001 | +0.01 % | within noise |",
        "| `verify: token_agreement` | 0.999 | 0.99 | -0.90 % | worse |",
        "| `train_cost: train_seconds` | 100 | 300 | +200.00 % | worse |",
    ]


def test_quality_comes_first_whatever_the_order_of_the_stages():
    names = ("data", "train", "train_cost", "eval", "eval_cost", "verify", "summary")
    before = {f"metrics/{name}.json": {"x": 1} for name in names}
    now = {f"metrics/{name}.json": {"x": 2} for name in names}
    rows = [row[0] for row in metric_rows(before, now, {})]
    assert rows == ["eval: x", "verify: x", "train: x", "data: x", "train_cost: x", "eval_cost: x"]


def test_parameters_are_listed_and_escaped(compared):
    assert "| `results.tuned` | 12.0 | 11.0 |" in compared
    assert r"| `train.note` | a \| b | \<b\>\[x\]\(y\)\</b\> |" in compared
    assert "learning_rate" not in compared
    assert "<b>" not in compared


def test_other_evaluation_set_is_not_comparable(repository):
    must(repository, "git", "checkout", "-q", "-f", "main")
    stub.branch(repository, "other-set", params_yaml=("aaaa", "bbbb"))
    edit(repository / "params.yaml", "tuned: 12.0", "tuned: 11.0")
    edit(repository / "evaluate.py", '"token_agreement": 0.999', '"token_agreement": 0.99')
    must(repository, "dvc", "repro", "-q")
    text = tool(repository, "compare", "--base", "main").stdout
    assert "| `eval: tuned_perplexity` | 12 | 11 | -8.33 % | not comparable |" in text
    assert "| `verify: token_agreement` | 0.999 | 0.99 | -0.90 % | not comparable |" in text
    assert "The evaluation sets differ" in text


def test_nothing_changed(repository):
    must(repository, "git", "checkout", "-q", "-f", "main")
    text = tool(repository, "compare", "--base", "main").stdout
    assert "No metric changed." in text
    assert "No parameter changed." in text


def test_unknown_base_fails_in_one_line(repository):
    done = tool(repository, "compare", "--base", "nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("compare: nowhere is no revision of this clone")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "before", "now", "noise", "expected"),
    [
        ("tuned_perplexity", 12.0, 11.0, None, "better"),
        ("tuned_perplexity", 12.0, 12.1, 0.01, "within noise"),
        ("tuned_perplexity", 12.0, 12.2, 0.01, "worse"),
        ("perplexity_change_percent", -0.5, 0.1, None, "better"),
        ("perplexity_change_percent", 0.1, -0.5, None, "worse"),
        ("tokens_per_second", 80.0, 90.0, None, "better"),
        ("tokens_per_second", 80.0, 70.0, None, "worse"),
        ("peak_vram_gb", 8.0, 9.0, None, "worse"),
        ("train_examples", 200, 100, None, "changed"),
        ("device", "CPU", "L4", None, "changed"),
        ("tuned_perplexity", None, 11.0, None, "changed"),
        ("tuned_perplexity", 11.0, None, None, "changed"),
        ("tuned_perplexity", 12.0, float("nan"), 0.01, "worse"),
        ("tuned_perplexity", float("nan"), 12.0, 0.01, "changed"),
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


def test_noise_repeats_the_commit_with_other_seeds(repository):
    must(repository, "git", "checkout", "-q", "-f", "main")
    must(repository, "dvc", "checkout", "-q")
    # What an interrupted measurement of another commit left.
    old = f"refs/exps/00/{'0' * 38}/noise-142"
    must(repository, "git", "update-ref", old, "no-metrics")
    assert tool(repository, "noise", "--seeds", "142", "242").returncode == 0
    must(repository, "git", "update-ref", "-d", old)
    result = json.loads((repository / "benchmarks/results/noise.json").read_text())
    assert result["seeds"] == [42, 142, 242]
    assert result["metrics"]["metrics/eval.json"]["tuned_perplexity"]["values"] == [12, 13, 14]
    assert result["metrics"]["metrics/verify.json"] == {}, "what does not vary is no noise"
    assert result["device"] == "CPU"
    assert not must(repository, "dvc", "exp", "list", "--name-only").strip()
    assert not must(repository, "git", "status", "--porcelain", "--untracked-files=no")


@pytest.mark.parametrize("seeds", [["42", "1"], ["1"], ["1", "1"]])
def test_noise_refuses_seeds_that_measure_nothing(repository, seeds):
    done = tool(repository, "noise", "--seeds", *seeds)
    assert done.returncode == 2
    assert "give 2 to 9 different seeds other than 42" in done.stderr
