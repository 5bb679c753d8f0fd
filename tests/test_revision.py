"""Git as the tools find it: below the top of a repository, as a partial clone, or missing."""

import os
import re
import shlex
from contextlib import chdir

import pytest
from stub_pipeline import must, tool

from stages.shared.process import StageError
from tools import schemas
from tools.revision import Revision

TOOLS = [
    ("gate", "--base=HEAD"),
    ("compare", "--base=HEAD"),
    ("check_repro",),
    ("free",),
    ("noise",),
]


def commit(folder, message, **files):
    """Write `files` (name without .yaml -> text) and commit them."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    must(folder, "git", "add", "-A")
    must(folder, "git", "commit", "-qm", message)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """Two branches and an annotated tag on neither's end; a project at the top and one below."""
    folder = tmp_path_factory.mktemp("git")
    must(folder, "git", "init", "-q", "-b", "main")
    (folder / "below").mkdir()
    commit(folder, "first", params="seed: 1", dvc="stages: {}")
    must(folder, "git", "tag", "-a", "v1", "-m", "v1")
    (folder / "below/params.yaml").write_text("seed: 2")
    commit(folder, "second", params="seed: 3")
    must(folder, "git", "branch", "feature/x")
    must(folder, "git", "checkout", "-q", "-b", "other")
    commit(folder, "third", params="seed: 4")
    return folder


def test_a_project_below_the_top_has_its_own_files(repository):
    with chdir(repository / "below"):
        revision = Revision("main")
        assert revision.params == {"seed": 2}
        assert revision.yaml("../params.yaml", schemas.PARAMS) == {"seed": 3}
        assert revision.bytes("dvc.yaml") is None, "the top's"
        assert Revision(None).params == {"seed": 2}
        assert {"params.yaml", "below/params.yaml"} <= Revision(None).files.keys()


@pytest.mark.parametrize("base", ["main", "origin/main", "feature/x", "origin/feature/x", "v1"])
def test_what_a_shallow_clone_of_one_branch_lacks_comes_by_the_command_that_is_said(
    repository, tmp_path, base
):
    assert_advice_helps(repository, tmp_path / "clone", base)


@pytest.mark.parametrize("spelled", ["%H", "%h"])
def test_a_commit_that_a_shallow_clone_lacks_comes_by_its_number(repository, tmp_path, spelled):
    base = must(repository, "git", "log", "-1", f"--format={spelled}", "v1").strip()
    assert_advice_helps(repository, tmp_path / "clone", base)


def test_an_earlier_commit_comes_with_the_history(repository, tmp_path):
    assert_advice_helps(repository, tmp_path / "clone", "HEAD~2")


def assert_advice_helps(repository, clone, base):
    arguments = ("--depth=1", "--branch=other", repository.as_uri(), str(clone))
    must(repository, "git", "clone", "-q", *arguments)
    done = tool(clone, "compare", "--base", base)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    advised = re.findall("`(.*?)`", done.stderr)
    must(clone, *shlex.split(advised[-1] if base == "v1" else advised[0]))
    assert tool(clone, "compare", "--base", base).returncode == 0


@pytest.mark.parametrize("arguments", TOOLS)
def test_without_git_every_tool_ends_in_a_line(repository, monkeypatch, tmp_path, arguments):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = tool(repository, *arguments)
    assert done.returncode == 2
    assert done.stderr.endswith("git is not installed; install it, as with: apt install git\n")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", TOOLS)
def test_outside_a_repository_every_tool_ends_in_git_s_line(tmp_path, monkeypatch, arguments):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    done = tool(tmp_path, *arguments)
    assert done.returncode == 2
    assert "fatal: not a git repository" in done.stderr
    assert "run it in the project's folder" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("folder", [".", "below"])
def test_a_repository_of_somebody_else_is_named_with_the_command_that_helps(
    repository, monkeypatch, tmp_path, folder
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / ".gitconfig"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    for arguments in TOOLS:
        done = tool(repository / folder, *arguments)
        assert done.returncode == 2
        assert f"dubious ownership in repository at '{repository}'; if you trust" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    must(repository, *shlex.split(done.stderr.partition("trust the owner: ")[2]))
    with chdir(repository / folder):
        assert Revision("main").params


def test_a_file_that_git_cannot_give_is_not_taken_for_an_empty_one(repository, tmp_path):
    """As a clone without blobs whose server is gone."""
    clone = tmp_path / "clone"
    must(repository, "git", "config", "uploadpack.allowFilter", "true")
    arguments = ("--filter=blob:none", "--no-checkout", repository.as_uri(), str(clone))
    must(repository, "git", "clone", "-q", *arguments)
    must(clone, "git", "remote", "set-url", "origin", f"file://{tmp_path}/gone")
    with chdir(clone), pytest.raises(StageError, match="does not appear to be a git repository"):
        _ = Revision("HEAD").params
    done = tool(clone, "gate", "--base", "HEAD")
    assert done.returncode == 2


def test_names_that_are_not_text_are_read(repository, tmp_path):
    name = os.fsdecode(b"\xff\n.txt")
    folder = tmp_path / "odd"
    must(tmp_path, "git", "init", "-q", str(folder))
    (folder / name).write_text("x")
    commit(folder, "odd", params="seed: 5")
    with chdir(folder):
        assert Revision("HEAD").bytes(name) == b"x"
        assert name in Revision(None).files
