"""The scripts of .github/workflows/ci.yml, run as GitHub runs them: `bash -e`."""

import os
import subprocess

import pytest
import stub_pipeline as stub
import yaml
from markdown_it import MarkdownIt
from tiny import ROOT


def run_step(name, folder, **variables):
    [job] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    [script] = [step["run"] for step in job["steps"] if step.get("name") == name]
    command = ["bash", "-e", "-c", script]
    env = os.environ | variables
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("tuned", "base", "status", "said"),
    [
        ("12.1", "main", 0, "gate: passed"),
        ("13.4", "main", 1, "broken: metrics/eval.json: tuned_perplexity rose by 11.67 %"),
        ("12.1", "conflict", 2, "gate: FAILED: conflict:gate.yaml:3: not YAML"),
    ],
)
def test_summary_has_each_table_and_the_verdict(tmp_path, tuned, base, status, said):
    folder = stub.make(tmp_path)
    stub.branch(folder, "conflict")
    (folder / "gate.yaml").write_text("a: 1\n<<<<<<< HEAD\n")
    stub.must(folder, "git", "commit", "-qam", "conflict")
    stub.branch(folder, "change", params_yaml=("tuned: 12.0", f"tuned: {tuned}"))
    stub.reproduce(folder, "change")
    summary = tmp_path / "summary.md"
    done = run_step(
        "Compare and gate",
        folder,
        BASE=base,
        RUNNER_TEMP=str(tmp_path / "runner"),
        GITHUB_STEP_SUMMARY=str(summary),
    )
    assert done.returncode == status, done.stderr
    assert said in summary.read_text()
    tokens = MarkdownIt("commonmark").enable("table").parse(summary.read_text())
    rows = [sum(token.type == "tr_open" for token in table) for table in tables(tokens)]
    # Ours of metrics and of parameters, then DVC's: a head and one changed row each.
    assert rows == [2, 2, 2, 2]


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
    done = run_step("Run the pipeline and hold it to what is committed", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "calls").read_text().splitlines() == called
    assert (tmp_path / "metrics/eval.json").exists() == kept


def test_hooks_run_what_ci_runs():
    [job] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = {hook["entry"] for repo in repos for hook in repo["hooks"]}
    assert entries
    assert entries <= {step.get("run") for step in job["steps"]}
