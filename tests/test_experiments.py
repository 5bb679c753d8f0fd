"""What README says about experiments: sweep, table, apply, branch, and freeing their disk space."""

import json
import re
import shutil

import pytest
import stub_pipeline as stub
from stub_pipeline import must, run, tool
from tiny import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Three experiments beside the committed run, made by a plain loop as in CI."""
    folder = stub.make(tmp_path_factory.mktemp("experiments"))
    for rate in ("1e-3", "1e-4", "1e-5"):
        must(
            folder,
            "dvc",
            "exp",
            "run",
            "--temp",
            "-q",
            "-n",
            f"rate-{rate}",
            "-S",
            f"train.learning_rate={rate}",
        )
    return folder


@pytest.fixture
def repository(swept, tmp_path):
    """A copy of it for each test to change."""
    return shutil.copytree(swept, tmp_path / "repository", symlinks=True)


def merged_weights(folder):
    """Files of DVC's cache that hold merged weights."""
    files = (path for path in (folder / ".dvc/cache/files").rglob("*") if path.is_file())
    return [path for path in files if path.read_bytes().startswith(b"merged with")]


def names(folder):
    return set(must(folder, "dvc", "exp", "list", "--name-only").split())


def test_the_table_shows_few_columns(repository):
    make = ["make", "--silent", "-f", str(ROOT / "Makefile"), "-o", ".venv/ready"]
    text = must(repository, *make, "experiments").splitlines()
    assert [cell for cell in re.split(r"[^\w.]+", text[1]) if cell] == [
        "Experiment",
        "train.learning_rate",
    ]
    assert len([line for line in text if "1e-05" in line]) == 1


def test_two_experiments_are_held_against_each_other(repository):
    text = must(repository, "dvc", "exp", "diff", "rate-1e-3", "rate-1e-4", "--md")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["params.yaml", "train.learning_rate", "0.001", "0.0001", "-0.0009"] in rows


def test_freeing_merged_models_loses_no_adapter(repository):
    assert len(merged_weights(repository)) == 4
    said = tool(repository, "free").stdout
    assert "free: would free (with --yes) 0.00 GB: 6 files of merged models" in said
    assert len(merged_weights(repository)) == 4
    assert "free: freed" in tool(repository, "free", "--yes").stdout
    assert [path.read_text() for path in merged_weights(repository)] == [
        (repository / "merged/weights").read_text()
    ]
    assert json.loads(must(repository, "dvc", "status", "--json")) == {}
    assert "0 files" in tool(repository, "free").stdout


def test_freeing_keeps_what_was_added_and_what_another_project_made(tmp_path):
    """They share the cache, where the same content is one file."""
    project = stub.make(tmp_path / "project", top=tmp_path)
    must(project, "git", "branch", "earlier")
    # A tag may point to any object; this one points to no commit.
    must(project, "git", "tag", "a-file", "HEAD:project/params.yaml")
    for folder, name in (("added", "mine"), ("made", "theirs")):
        (tmp_path / folder).mkdir()
        shutil.copyfile(project / "merged/weights", tmp_path / folder / name)
    must(tmp_path, "dvc", "add", "-q", "added/mine")
    (tmp_path / "made/dvc.yaml").write_text("stages: {made: {cmd: 'true', outs: [theirs]}}")
    must(tmp_path / "made", "dvc", "commit", "-q", "--force")
    stub.edit(project / "params.yaml", "2.0e-3", "1.0e-3")
    stub.reproduce(project, "another model")
    for file, freed in {"added/mine.dvc": 1, "made/dvc.lock": 1, "made/dvc.yaml": 2}.items():
        # Only the listing of the earlier merged model, as long as a commit names its weights.
        assert f" {freed} files of merged models" in tool(project, "free").stdout
        must(tmp_path, "git", "rm", "-q", file)
        must(tmp_path, "git", "commit", "-qm", f"without {file}")


def test_a_freed_model_is_merged_again_without_training(repository):
    tool(repository, "free", "--yes")
    assert "merged" in run(repository, "dvc", "exp", "apply", "rate-1e-4").stderr
    told = must(repository, "dvc", "repro")
    assert "Running stage 'merge'" in told
    assert "Running stage 'evaluate'" not in told
    assert "0.0001" in (repository / "merged/weights").read_text()
    must(repository, "git", "checkout", "-q", "-f", "main")
    must(repository, "dvc", "checkout", "-q")


def test_removing_experiments_frees_theirs_alone(repository):
    """The documented pair of commands keeps other experiments and other branches whole."""
    tool(repository, "free", "--yes")
    must(repository, "dvc", "exp", "branch", "-q", "rate-1e-3", "kept")
    must(repository, "dvc", "exp", "remove", "-q", "rate-1e-3", "rate-1e-5")
    must(repository, "dvc", "gc", "-q", "-f", "-w", "-a", "-T", "--all-experiments")
    assert names(repository) == {"rate-1e-4"}
    cached = (repository / ".dvc/cache/files").rglob("*")
    kept = [path.read_text() for path in cached if path.is_file() and path.suffix != ".dir"]
    for rate, there in {"0.001": True, "0.0001": True, "1e-05": False}.items():
        assert any(text.startswith("{") and f": {rate}," in text for text in kept) == there, rate
    must(repository, "git", "checkout", "-q", "kept")
    # The merged model was freed above; the adapter was not.
    run(repository, "dvc", "checkout", "-q")
    assert "Running stage 'evaluate'" not in must(repository, "dvc", "repro")
    must(repository, "git", "checkout", "-q", "-f", "main")
    must(repository, "dvc", "checkout", "-q")


def test_a_remote_serves_what_is_needed(repository, tmp_path):
    """Push, clone, pull one output, and reproduce everything without running a stage."""
    clone = tmp_path / "clone"
    must(repository, "git", "checkout", "-q", "-f", "main")
    must(repository, "dvc", "checkout", "-q", "--force")
    must(
        repository,
        "dvc",
        "remote",
        "add",
        "-q",
        "-f",
        "-d",
        "--local",
        "store",
        str(tmp_path / "s"),
    )
    must(repository, "dvc", "push", "-q")
    must(tmp_path, "git", "clone", "-q", "-b", "main", str(repository), str(clone))
    must(clone, "dvc", "remote", "add", "-q", "-d", "--local", "store", str(tmp_path / "s"))
    must(clone, "dvc", "pull", "-q", "adapter")
    assert (clone / "adapter/weights").exists()
    assert not (clone / "merged").exists()
    told = must(clone, "dvc", "repro", "--pull", "--allow-missing")
    assert "Running stage" not in told
