"""The gate over real branches of a repository that the real DVC ran.

What it makes of each metric and file is in tests/test_gate_rules.py.
"""

import hashlib

import pytest
import stub_pipeline as stub
from stub_pipeline import edit, must, tool

# branch: edits of files before a run, edits after it, exit status and what must be said
BRANCHES = {
    "same": ({}, {}, 0, "passed: 5 metrics within the limits"),
    "with_a_table": (
        {"evaluate.py": ('"token_agreement"', '"cards": [{"card_gb": 4}], "token_agreement"')},
        {},
        0,
        "gate: passed",
    ),
    "worse": (
        {"params.yaml": ("12.0", "13.4")},
        {},
        1,
        "broken: metrics/eval.json: tuned_perplexity rose by 11.67 %, from 12 to 13.4; "
        "10 % is allowed",
    ),
    "not_a_number": (
        {"params.yaml": ("12.0", ".nan")},
        {},
        1,
        "broken: metrics/eval.json: tuned_perplexity is nan",
    ),
    "merge_broken": (
        {"evaluate.py": ('"nonfinite_values": 0', '"nonfinite_values": 3')},
        {},
        1,
        "broken: metrics/verify.json: nonfinite_values is 3; at most 0 is allowed",
    ),
    "moves_the_limits": (
        {"params.yaml": ("12.0", "24.0"), "gate.yaml": ("percent: 10", "percent: 500")},
        {},
        1,
        "tuned_perplexity rose by 100.00 %, from 12 to 24; 10 % is allowed",
    ),
    "other_evaluation_set": (
        {"params.yaml": ("aaaa", "bbbb")},
        {},
        2,
        "not comparable: metrics/eval.json: eval_set_sha256 is bbbb, but aaaa at the base",
    ),
    "edited_by_hand": (
        {},
        {"metrics/eval.json": ("12.0", "9.0")},
        2,
        "not consistent: metrics/eval.json is not what dvc.lock recorded",
    ),
    "params_without_a_run": (
        {},
        {"params.yaml": ("2.0e-3", "1.0e-4")},
        2,
        "not consistent: stage evaluate ran with another train in params.yaml",
    ),
    "code_without_a_run": (
        {},
        {"evaluate.py": ("0.999", "0.99")},
        2,
        "not consistent: stage evaluate ran with another evaluate.py",
    ),
    "folder_without_a_run": (
        {},
        {"templates/chat": ("{prompt}", "{answer}")},
        2,
        "not consistent: stage evaluate ran with another templates",
    ),
    "command_without_a_run": (
        {},
        {"dvc.yaml": ("python evaluate.py", "python -O evaluate.py")},
        2,
        "not consistent: stage evaluate ran with other command than dvc.yaml has",
    ),
    "dependency_without_a_run": (
        {},
        {"dvc.yaml": ("[evaluate.py, ", "[evaluate.py, gate.yaml, ")},
        2,
        "not consistent: stage evaluate ran with other deps than dvc.yaml has",
    ),
    "params_undeclared": (
        {},
        {"dvc.yaml": ("[seed, train, ", "[seed, ")},
        2,
        "not consistent: stage evaluate ran with other params than dvc.yaml has",
    ),
    "metrics_undeclared": (
        {},
        {"dvc.yaml": ("    - metrics/train_cost.json: {cache: false}\n", "")},
        2,
        "not consistent: stage evaluate ran with other outs than dvc.yaml has",
    ),
    "stage_without_a_run": (
        {},
        {"dvc.yaml": ("stages:\n", "stages:\n  other: {cmd: 'true'}\n")},
        2,
        "not consistent: stage other has never run",
    ),
    "not_json": (
        {"evaluate.py": ("json.dumps(values)", "'{,'")},
        {},
        2,
        "HEAD:metrics/eval.json: not JSON",
    ),
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return stub.make(tmp_path_factory.mktemp("gate"))


@pytest.mark.parametrize("name", BRANCHES)
def test_branch(repository, name):
    before, after, status, message = BRANCHES[name]
    must(repository, "git", "checkout", "-q", "-B", name, "main")
    for file, change in before.items():
        edit(repository / file, *change)
    if before:
        stub.reproduce(repository, name)
    for file, change in after.items():
        edit(repository / file, *change)
    if after:
        must(repository, "git", "commit", "-qam", name)
    done = tool(repository, "gate", "--base", "main")
    assert done.returncode == status, done.stdout + done.stderr
    assert message in done.stdout + done.stderr
    assert ("passed" in done.stdout) == (status == 0)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("metrics/train_cost.json", "metrics/train_cost.json is missing"),
        ("merge.py", "stage merge ran with another merge.py"),
        ("templates/chat", "stage evaluate ran with another templates"),
    ],
)
def test_a_deleted_file_is_not_consistent(repository, file, message):
    must(repository, "git", "checkout", "-q", "-B", "deleted", "main")
    must(repository, "git", "rm", "-q", file)
    must(repository, "git", "commit", "-qm", "deleted")
    done = tool(repository, "gate", "--base", "main")
    must(repository, "git", "checkout", "-q", "main")
    assert done.returncode == 2
    assert f"not consistent: {message};" in done.stdout


def test_a_folder_that_git_sees_in_part_is_taken_at_its_word(repository):
    """As data/source is, where people put data that Git ignores."""
    must(repository, "git", "checkout", "-q", "-B", "in-part", "main")
    (repository / "templates/.gitignore").write_text("/local\n")
    (repository / "templates/local").write_text("data")
    stub.reproduce(repository, "a run with an ignored file")
    done = tool(repository, "gate", "--base", "main")
    (repository / "templates/local").unlink()
    must(repository, "git", "checkout", "-q", "main")
    assert done.returncode == 0, done.stdout


def test_no_limits_at_all_judges_nothing(repository):
    must(repository, "git", "checkout", "-q", "-B", "no-limits", "main")
    must(repository, "git", "rm", "-q", "gate.yaml")
    must(repository, "git", "commit", "-qm", "no limits")
    done = tool(repository, "gate", "--base", "no-limits")
    must(repository, "git", "checkout", "-q", "main")
    assert done.returncode == 2
    assert "gate.yaml: no limits, neither at no-limits nor at HEAD" in done.stderr


@pytest.mark.parametrize("base", ["nowhere", "origin/main", "--all", ""])
def test_unknown_base_fails_in_one_line(repository, base):
    done = tool(repository, "gate", f"--base={base}")
    assert done.returncode == 2
    assert f"gate: FAILED: {base or repr(base)} is not a revision here; " in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_base_without_metrics_passes_with_a_notice(repository):
    must(repository, "git", "checkout", "-q", "main")
    done = tool(repository, "gate", "--base", "no-metrics")
    assert done.returncode == 0
    assert "notice: no-metrics has no metrics/eval.json yet" in done.stdout


def test_absolute_limits_hold_without_a_base(repository):
    must(repository, "git", "checkout", "-q", "-B", "broken-at-once", "main")
    edit(repository / "evaluate.py", '"nonfinite_values": 0', '"nonfinite_values": 3')
    stub.reproduce(repository, "broken at once")
    done = tool(repository, "gate", "--base", "no-metrics")
    assert done.returncode == 1
    assert "nonfinite_values is 3" in done.stdout


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            "metrics/eval.json: {tuned_perplexity: {may_rise: 5}}",
            "may_rise: must be 'may_rise_perc",
        ),
        (
            "metrics/eval.json: {tuned_perplexity: {at_most: x}}",
            "at_most: must be a number (got 'x'",
        ),
        ("metrics/eval.json: {tuned_perplexity: {at_most: .nan}}", "at_most: must be a finite num"),
        ("metrics/eval.json: {tuned_perplexity: {at_most: .inf}}", "at_most: must be a finite num"),
        (
            "metrics/eval.json: {tuned_perplexity: {at_most: 1e999}}",
            "at_most: must be a finite num",
        ),
        (
            "metrics/eval.json: {tuned_perplexity: {at_most: }}",
            "at_most: must be a number (got None)",
        ),
        (
            "metrics/eval.json: {tuned_perplexity: {at_most: true}}",
            "at_most: must be a number (got T",
        ),
        (
            "metrics/eval.json: {tuned_perplexity: {}}",
            "metrics/eval.json: tuned_perplexity: is empty",
        ),
        (
            "metrics/eval.json: {tuned_perplexity: }",
            "tuned_perplexity: must be a mapping (got None)",
        ),
        ("metrics/eval.json: {}", "faulty:gate.yaml: metrics/eval.json: is empty"),
        ("metrics/eval.json:", "metrics/eval.json: must be a mapping (got None)"),
        (
            "metrics/eval.json: [tuned_perplexity]",
            "gate.yaml: metrics/eval.json: must be a mapping",
        ),
        ("metrics/eval.json: {tuned_perplexity: 5}", "tuned_perplexity: must be a mapping (got 5)"),
        ("- 5", "faulty:gate.yaml: must be a mapping"),
        ("a: [", "faulty:gate.yaml:2: not YAML: "),
        ("a: 1\n<<<<<<< HEAD", "faulty:gate.yaml:3: not YAML: could not find expected ':'"),
        ("a: 1\na: 2", "faulty:gate.yaml:2: not YAML: "),
        ("\x00", "faulty:gate.yaml: not YAML: "),
    ],
)
def test_faulty_limits_are_refused(repository, limits, message):
    must(repository, "git", "checkout", "-q", "-B", "faulty", "main")
    (repository / "gate.yaml").write_text(limits + "\n")
    must(repository, "git", "commit", "-qam", "faulty limits")
    done = tool(repository, "gate", "--base", "faulty")
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_uncommitted_changes_are_not_judged_but_said(repository):
    must(repository, "git", "checkout", "-q", "main")
    edit(repository / "metrics/eval.json", "12.0", "99.0")
    done = tool(repository, "gate", "--base", "main")
    must(repository, "git", "checkout", "-q", "metrics")
    assert done.returncode == 0
    assert "notice: uncommitted changes are not judged" in done.stdout


def test_metrics_and_lock_edited_alike_are_called_consistent_and_no_more(repository):
    must(repository, "git", "checkout", "-q", "-B", "typed-twice", "main")
    metrics = repository / "metrics/eval.json"
    old = hashlib.md5(metrics.read_bytes()).hexdigest()
    edit(metrics, "12.0", "9.0")
    edit(repository / "dvc.lock", old, hashlib.md5(metrics.read_bytes()).hexdigest())
    must(repository, "git", "commit", "-qam", "a better number")
    said = tool(repository, "gate", "--base", "main").stdout
    # What a run would make.
    must(repository, "git", "checkout", "-q", "main", "--", "metrics", "dvc.lock")
    checked = tool(repository, "check_repro")
    must(repository, "git", "checkout", "-q", "-f", "main")
    assert "notice: metrics are consistent with dvc.lock; only a run can confirm both" in said
    assert checked.returncode == 1
    assert "metrics/eval.json: tuned_perplexity: 9.0 committed, 12.0 now" in checked.stderr


def test_the_limits_of_a_project_below_the_top_are_judged(tmp_path):
    """Its files, and not those of the same names at the top."""
    project = stub.make(tmp_path / "project", top=tmp_path)
    names = ("dvc.yaml", "dvc.lock", "params.yaml", "gate.yaml", "metrics", "evaluate.py")
    must(project, "cp", "-r", *names, "merge.py", "templates", "..")
    must(tmp_path, "git", "add", "-A")
    must(tmp_path, "git", "commit", "-qm", "a project at the top, too")
    edit(project / "evaluate.py", '"nonfinite_values": 0', '"nonfinite_values": 3')
    stub.reproduce(project, "a ruined merge")
    done = tool(project, "gate", "--base", "HEAD~1")
    assert "broken: metrics/verify.json: nonfinite_values is 3" in done.stdout
    assert done.returncode == 1
    rows = tool(project, "compare", "--base", "HEAD~1").stdout
    assert "| `verify: nonfinite_values` | 0 | 3 |  | worse |" in rows
    assert tool(project, "check_repro").returncode == 0
    edit(project / "metrics/verify.json", '"nonfinite_values": 3', '"nonfinite_values": 0')
    assert "nonfinite_values: 3 committed, 0 now" in tool(project, "check_repro").stderr
