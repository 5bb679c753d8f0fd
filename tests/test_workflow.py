"""The scripts of .github/workflows/ci.yml, run as GitHub runs them: `bash -e`."""

import os
import shutil
import subprocess
import sys

import pytest
import stub_pipeline as stub
import yaml
from markdown_it import MarkdownIt
from stub_pipeline import must
from tiny import ROOT

from tools.lock import pins

JOBS = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
# Packages that the gate's job installs.
INSTALLED = {"annotated-types", "pydantic", "pydantic-core", "ruamel-yaml"}
INSTALLED |= {"typing-extensions", "typing-inspection"}
# What it runs, it tells.
SPY = "import os\nopen(os.environ['RUNNER_TEMP'] + '/ran', 'a').write(__file__ + '\\n')\n"
# The environment is the tests' own.
PYTHON = f"""\
#!/bin/sh
[ "$2" = venv ] || exec {sys.executable} "$@"
mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
printf '#!/bin/sh\\necho "$@" > "$RUNNER_TEMP/installed"' > "$3/bin/pip" && chmod +x "$3/bin/pip"
"""


def run_step(name, folder, **variables):
    steps = [step for job in JOBS.values() for step in job["steps"]]
    [step] = [step for step in steps if step.get("name") == name]
    set_there = {k: v for k, v in step.get("env", {}).items() if "{{" not in v}
    env = os.environ | set_there | {key: str(value) for key, value in variables.items()}
    command = ["bash", "-e", "-c", step["run"]]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The repository with the tools and a list of versions committed, as the project's."""
    folder = stub.make(tmp_path_factory.mktemp("workflow"))
    for name in ("tools", "stages"):
        (folder / name).unlink()
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    (folder / ".gitignore").write_text("/adapter\n/merged\n__pycache__\n")
    shutil.copyfile(ROOT / "requirements.lock", folder / "requirements.lock")
    must(folder, "git", "add", "-A")
    must(folder, "git", "commit", "-qm", "tools")
    stub.branch(folder, "conflict")
    (folder / "gate.yaml").write_text("a: 1\n<<<<<<< HEAD\n")
    must(folder, "git", "commit", "-qam", "conflict")
    for name, tuned in {"same": "12.1", "worse": "13.4"}.items():
        stub.branch(folder, name, params_yaml=("tuned: 12.0", f"tuned: {tuned}"))
        stub.reproduce(folder, name)
    for file in ("tools/gate.py", "tools/__init__.py", "stages/__init__.py"):
        (folder / file).write_text(SPY + "raise SystemExit(0)\n")
    for name in ("sitecustomize", "usercustomize", "pydantic", "math", "pip", "venv"):
        (folder / f"{name}.py").write_text(SPY)
    must(folder, "git", "checkout", "-q", "-b", "sly")
    must(folder, "git", "add", "-A")
    must(folder, "git", "commit", "-qm", "a gate that passes everything")
    return folder


@pytest.fixture
def gate(project, tmp_path, monkeypatch):
    """Runs the gate's step on a branch: (exit status, summary, what the runner holds)."""

    def run(branch, base):
        programs, runner = tmp_path / "programs", tmp_path / "runner"
        programs.mkdir()
        runner.mkdir()
        (programs / "python").write_text(PYTHON)
        (programs / "python").chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        must(project, "git", "checkout", "-q", "-f", branch)
        summary = tmp_path / "summary.md"
        files = {"RUNNER_TEMP": runner, "GITHUB_STEP_SUMMARY": summary}
        done = run_step("Gate", project, BASE=base, **files)
        must(project, "git", "worktree", "remove", "--force", str(runner / "base"))
        return done.returncode, summary.read_text(), runner

    return run


@pytest.mark.parametrize(
    ("branch", "base", "status", "said"),
    [
        ("same", "main", 0, "gate: passed"),
        ("worse", "main", 1, "broken: metrics/eval.json: tuned_perplexity rose by 11.67 %"),
        ("sly", "main", 1, "broken: metrics/eval.json: tuned_perplexity rose by 11.67 %"),
        ("same", "conflict", 2, "gate: FAILED: conflict:gate.yaml:3: not YAML"),
        ("worse", "no-metrics", 0, "no-metrics has no gate yet; nothing is judged"),
    ],
)
def test_the_base_s_gate_judges_and_none_of_the_change_s_code_runs(
    gate, branch, base, status, said
):
    ended, summary, runner = gate(branch, base)
    assert (ended, (runner / "ran").exists()) == (status, False), summary
    assert said in summary
    if base == "main":
        [block] = MarkdownIt("commonmark").parse(summary)
        assert (block.type, said in block.content) == ("fence", True)
        assert (runner / "installed").read_text() == (
            f"install -q --require-hashes -r {runner}/gate.lock\n"
        )
        assert set(pins((runner / "gate.lock").read_text())) == INSTALLED


def test_the_gate_s_job_is_its_own():
    assert "needs" not in JOBS["gate"]
    assert [step["name"] for step in JOBS["gate"]["steps"] if "run" in step] == ["Gate"]


def test_the_gate_needs_no_more_than_its_job_installs():
    code = "import sys, tools.gate; print(*{n.partition('.')[0] for n in sys.modules})"
    command = [sys.executable, "-c", f"import sys; before = set(sys.modules); {code}"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    modules = {
        name.replace("-", "_"): name for name in pins((ROOT / "requirements.lock").read_text())
    }
    modules["ruamel"] = "ruamel-yaml"
    assert {modules[name] for name in told.split() if name in modules} <= INSTALLED


def test_the_summary_has_our_tables(project, tmp_path):
    must(project, "git", "checkout", "-q", "-f", "worse")
    summary = tmp_path / "summary.md"
    done = run_step("Compare", project, BASE="main", GITHUB_STEP_SUMMARY=summary)
    assert done.returncode == 0, done.stderr
    tokens = MarkdownIt("commonmark").enable("table").parse(summary.read_text())
    rows = [sum(token.type == "tr_open" for token in table) for table in tables(tokens)]
    # Of metrics and of parameters: a head and one changed row each.
    assert rows == [2, 2]
    assert "tuned_perplexity" in done.stdout, "DVC's own are in the log"


def tables(tokens):
    """The tokens of each table."""
    kinds = [token.type for token in tokens]
    starts = [i for i, kind in enumerate(kinds) if kind == "table_open"]
    return [tokens[start : kinds.index("table_close", start)] for start in starts]


@pytest.mark.parametrize(
    ("remotes", "called", "kept"),
    [
        ("", ["dvc remote list", "make repro", "python -m tools.check_repro"], False),
        (
            "store\ts3://bucket",
            [
                "dvc remote list",
                "dvc repro --pull --allow-missing",
                "python -m tools.check_repro",
            ],
            True,
        ),
    ],
)
def test_run_uses_a_remote_where_one_is_set(tmp_path, remotes, called, kept):
    programs = tmp_path / ".venv/bin"
    programs.mkdir(parents=True)
    for name in ("dvc", "make", "python"):
        told = f"[ $1 != remote ] || printf '{remotes}'" if name == "dvc" else ""
        (programs / name).write_text(f'#!/bin/sh\necho {name} "$@" >> calls\n{told}\n')
        (programs / name).chmod(0o755)
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics/eval.json").write_text("{}")
    done = run_step("Run the pipeline and compare it with what is committed", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "calls").read_text().splitlines() == called
    assert (tmp_path / "metrics/eval.json").exists() == kept


def test_hooks_run_what_ci_runs():
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["pipeline"]
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = {hook["entry"] for repo in repos for hook in repo["hooks"]}
    assert entries
    assert entries <= {step.get("run") for step in job["steps"]}
