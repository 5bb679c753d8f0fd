"""What DVC runs, keeps and restores with the real dvc.yaml."""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import stubs
import yaml
from dvc.exceptions import ReproductionError
from dvc.repo import Repo
from stubs import PIPELINE, commit, must, run
from tiny import ROOT, append

from tools.recover import broken, declared_outs, recover_dvc_lock

pytestmark = pytest.mark.slow

ALL = list(PIPELINE)
AFTER_TRAIN = ["train", "evaluate", "merge", "verify", "export"]
AFTER_MODEL = [name for name in ALL if name not in ("fetch_data", "fetch_retention")]
# A change -> the stages that run for it, in order.
STALE = {
    "seed": AFTER_TRAIN,
    "model": AFTER_MODEL,
    "dataset": ["fetch_data", "prepare", "plan", *AFTER_TRAIN],
    # It fetches, prepares and trains nothing else.
    "retention": ["fetch_retention", "evaluate", "export"],
    "prepare": ["prepare", "plan", *AFTER_TRAIN],
    # A better estimate, or a limit set later, never retrains a model.
    "plan": ["plan", "export"],
    "quantize": ["plan", "quantize", *AFTER_TRAIN],
    "lora": ["plan", *AFTER_TRAIN],
    # Rows are encoded with them.
    "lora.new_tokens": ["prepare", "plan", *AFTER_TRAIN],
    "train": ["plan", *AFTER_TRAIN],
    # What shows training while it runs changes no result.
    "tracking": [],
    "evaluate": ["evaluate", "export"],
    "merge": ["merge", "verify", "export"],
    "verify": ["verify", "export"],
    "export": ["export"],
    "stages/fetch_model.py": AFTER_MODEL,
    "stages/fetch_data.py": ["fetch_data", "prepare", "plan", *AFTER_TRAIN],
    "stages/fetch_retention.py": ["fetch_retention", "evaluate", "export"],
    "stages/prepare.py": ["prepare", "plan", *AFTER_TRAIN],
    "stages/plan.py": ["plan", "export"],
    "stages/quantize.py": ["quantize", *AFTER_TRAIN],
    "stages/train.py": AFTER_TRAIN,
    "stages/evaluate.py": ["evaluate", "export"],
    "stages/merge.py": ["merge", "verify", "export"],
    "stages/verify.py": ["verify", "export"],
    "stages/export.py": ["export"],
    "stages/shared/params.py": [],
    "README.md": [],
    "tools/gate.py": [],
}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """The file to which every stub appends its name."""
    path = tmp_path_factory.mktemp("stubs") / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STUB_LOG", str(path))
        patch.setenv("DVC_NO_ANALYTICS", "1")
        yield path


@pytest.fixture(scope="module")
def repository(tmp_path_factory, log):
    """A finished run of the stubs, committed."""
    folder = stubs.make(tmp_path_factory.mktemp("dvc") / "repository")
    must(folder, "dvc", "repro", "-q", STUB_GUARDED="1")
    commit(folder, "first run")
    return folder


@pytest.fixture
def fresh(repository, log, tmp_path):
    """A copy of the finished run, with a cache of its own."""
    folder = tmp_path / "repository"
    shutil.copytree(repository, folder, symlinks=True)
    log.write_text("")
    return folder


def reproduce(folder: Path, log: Path) -> list[str]:
    """`dvc repro`; the stages whose commands ran."""
    log.write_text("")
    with contextlib.chdir(folder), Repo() as repo:
        repo.reproduce()
    return log.read_text().split()


def change(folder: Path, what: str, value: int) -> None:
    """Change a section of params.yaml or the bytes of a file."""
    section, _, leaf = what.partition(".")
    if section in PARAMS:
        params = yaml.safe_load((folder / "params.yaml").read_text())
        if isinstance(params[section], dict):
            params[section][leaf or "changed"] = value
        else:
            params[what] = value
        (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    else:
        append(folder / what, f"# {value}\n")


PARAMS = yaml.safe_load(stubs.PARAMS.read_text())


@pytest.fixture(scope="module")
def changing(repository, log, tmp_path_factory):
    """One copy of the finished run, to which the rows of the table are applied in turn."""
    folder = tmp_path_factory.mktemp("changing") / "repository"
    shutil.copytree(repository, folder, symlinks=True)
    reproduce(folder, log)
    return folder


def test_table_has_every_section_and_script():
    assert set(STALE) >= set(PARAMS) | {f"stages/{name}.py" for name in ALL}


@pytest.mark.parametrize("what", STALE)
def test_exactly_what_is_stale_runs(changing, log, what):
    change(changing, what, len(what) + 1000)
    assert reproduce(changing, log) == STALE[what]


def test_going_back_runs_nothing(repository, changing, log):
    """The last test with this copy: all changes are taken back at once."""
    first = (repository / "models/adapter/data.bin").read_text()
    assert (changing / "models/adapter/data.bin").read_text() != first
    must(changing, "git", "checkout", "-q", "params.yaml", "stages", "tools")
    assert reproduce(changing, log) == []
    assert (changing / "models/adapter/data.bin").read_text() == first


def test_experiment_changes_numbers_and_its_metrics_are_shown(fresh, log):
    must(
        fresh,
        *("dvc", "exp", "run", "-q", "-n", "slow"),
        *("-S", "train.learning_rate=1e-5", "-S", "lora.r=64"),
        STUB_GUARDED="1",
    )
    assert log.read_text().split() == STALE["lora"]
    assert "learning_rate: 1e-05\n" in (fresh / "params.yaml").read_text()
    # The stub writes what load_params gave it: a number, where PyYAML reads text.
    assert json.loads((fresh / "metrics/train.json").read_text())["rate"] == 1e-5
    # With a wrong type, nothing runs.
    typo = run(fresh, "dvc", "exp", "run", "-S", "lora.rank=3")
    assert typo.returncode == 255
    assert "Could not override 'lora.rank'" in typo.stderr
    log.write_text("")
    bad = run(fresh, "dvc", "exp", "run", "-S", "lora.r=abc", STUB_GUARDED="1")
    assert bad.returncode == 255
    assert "params.yaml: lora.r: must be a whole number (got 'abc')" in bad.stderr
    assert log.read_text() == ""


def test_experiments_in_copies_and_in_the_queue(fresh, log):
    temp = ("dvc", "exp", "run", "--temp", "-q", "-n", "copy")
    must(fresh, *temp, "-S", "lora.r=8", STUB_GUARDED="1")
    queue = ("dvc", "exp", "run", "--queue", "-q", "-n", "sweep")
    must(fresh, *queue, "-S", "lora.r=32,64")
    start_queue = functools.partial(must, fresh, "dvc", "queue", "start", "-q", STUB_GUARDED="1")
    start_queue()
    wait_for(fresh, "Success", 2, again=start_queue)
    shown = json.loads(must(fresh, "dvc", "exp", "show", "--json", "--hide-workspace"))
    ranks = {}
    for entry in shown[0]["experiments"]:
        revision = entry["revs"][0]["data"]
        rank = revision["params"]["params.yaml"]["data"]["lora"]["r"]
        ranks[rank] = revision["metrics"]["metrics/eval.json"]["data"]["value"]
    assert sorted(ranks) == [8, 32, 64]
    assert len(set(ranks.values())) == 3
    assert must(fresh, "git", "status", "--porcelain") == ""


def test_clone_without_a_remote_compares_its_metrics(fresh, log, tmp_path):
    change(fresh, "evaluate", 1)
    reproduce(fresh, log)
    commit(fresh, "another evaluation")
    must(tmp_path, "git", "clone", "-q", str(fresh), "clone")
    shown = must(tmp_path / "clone", "dvc", "metrics", "diff", "HEAD~1", "--md")
    assert "| metrics/eval.json | value |" in " ".join(shown.split())


def start(folder: Path, *command: str, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        # nohup and a shell's `&` ignore signals in all processes that they start.
        ("env", "--default-signal", *command),
        cwd=folder,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@contextlib.contextmanager
def paused(folder: Path, log: Path, stage: str, *command: str, **env: str):
    """`dvc repro` (or another command) halted in the middle of `stage`; then let it go on."""
    with halted(log, stage):
        process = start(folder, *(command or ("dvc", "repro")), STUB_GUARDED="1", **env)
        while stage not in log.read_text().split():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        yield process
    process.wait()


@contextlib.contextmanager
def halted(log: Path, stage: str):
    """Within it, every run of `stage` halts in the middle."""
    gate = Path(f"{log}.{stage}")
    gate.touch()
    log.write_text("")
    try:
        yield
    finally:
        gate.unlink()


def runs(folder: Path) -> list[str]:
    """The entries of the run cache."""
    cache = folder / ".dvc/cache/runs"
    return sorted(path.relative_to(cache).as_posix() for path in cache.rglob("*"))


EDITS = {
    "params.yaml: lora": ("params.yaml", "  alpha: 32", "  alpha: 64"),
    "stages/train.py": ("stages/train.py", "Stub of train", "Edited stub of train"),
    "stages/training/trainer.py": ("stages/training/trainer.py", "\n", "\n# edited\n"),
    "dvc.yaml: train": ("dvc.yaml", "    desc: Train a LoRA", "    desc: Train another LoRA"),
}


@pytest.mark.parametrize("edited", EDITS)
def test_nothing_is_recorded_under_a_false_name(fresh, log, edited):
    """DVC reads parameters and code after the command, and would record these."""
    change(fresh, "stages/train.py", 1)
    name, old, new = EDITS[edited]
    lock, cached = (fresh / "dvc.lock").read_bytes(), runs(fresh)
    with paused(fresh, log, "train") as process:
        text = (fresh / name).read_text()
        assert old in text
        (fresh / name).write_text(text.replace(old, new, 1))
    said = process.stdout.read()
    assert process.returncode == 255
    assert f"train: {edited} changed while the stage ran, so its result is not recorded" in said
    assert (fresh / "dvc.lock").read_bytes() == lock
    assert runs(fresh) == cached
    assert not (fresh / "models/adapter").exists()
    assert must(fresh, "git", "ls-files", "--others", "--exclude-standard") == ""
    if edited == "params.yaml: lora":
        # The rerun uses the current files, and takes nothing from a cache.
        assert reproduce(fresh, log) == STALE["lora"]


def test_outputs_of_before_come_back_with_the_commands_printed(fresh, log):
    before = (fresh / "models/adapter/data.bin").read_text()
    change(fresh, "stages/train.py", 1)
    with paused(fresh, log, "train") as process:
        append(fresh / "params.yaml", "# touched\n")
        text = (fresh / "params.yaml").read_text()
        (fresh / "params.yaml").write_text(text.replace("  alpha: 32", "  alpha: 64"))
    said = process.stdout.read()
    assert not (fresh / "models/adapter").exists()
    commands = said.partition("restore the earlier outputs with: ")[2].splitlines()[0]
    assert commands == "git checkout params.yaml dvc.lock metrics && dvc checkout"
    must(fresh, "bash", "-c", commands)
    assert (fresh / "models/adapter/data.bin").read_text() == before
    assert must(fresh, "git", "status", "--porcelain", "--", "metrics", "params.yaml") == ""


def test_every_stage_fails_in_its_own_words(repository, log, tmp_path, monkeypatch, capfd):
    """Each once, through dvc, in one line and the advice: the last one first, so that each can."""
    folder = tmp_path / "repository"
    shutil.copytree(repository, folder, symlinks=True)
    monkeypatch.setenv("STUB_GUARDED", "1")
    monkeypatch.setenv("STUB_FAILS", "1")
    for name in reversed(ALL):
        with contextlib.chdir(folder), Repo() as repo, pytest.raises(ReproductionError):
            repo.reproduce(name, single_item=True, force=True)
        told = capfd.readouterr().err.splitlines()
        assert told == [
            f"{name}: told to fail",
            f"{name}: restore the earlier outputs with: "
            "git checkout params.yaml dvc.lock metrics && dvc checkout",
        ]


@pytest.mark.parametrize(
    ("number", "shell"),
    [
        (signal.SIGKILL, "/bin/bash"),
        (signal.SIGKILL, "/bin/sh"),
        (signal.SIGTERM, "/bin/bash"),
        (signal.SIGHUP, "/bin/sh"),
    ],
)
def test_stage_ends_with_dvc(fresh, log, number, shell):
    change(fresh, "stages/train.py", 1)
    with paused(fresh, log, "train", SHELL=shell) as process:
        stage = child_of(process.pid)
        process.send_signal(number)
        process.wait()
        ends(stage)
    assert not (fresh / "models/adapter").exists()
    # Nothing prevents the next run.
    assert reproduce(fresh, log) == AFTER_TRAIN


@pytest.mark.parametrize("where", ["Python's own end", "what a library does at exit"])
def test_interrupt_at_the_end_of_a_stage_is_heard(fresh, log, where):
    """Ctrl-C after all is written: it is recorded, no stage follows, and nothing runs again."""
    change(fresh, "stages/train.py", 1)
    gate = Path(f"{log}.train.end")
    gate.touch()
    env = {"STUB_GUARDED": "1"} | ({"STUB_AT_EXIT": "1"} if where.startswith("what") else {})
    process = start(fresh, "dvc", "repro", **env)
    said = ""
    while "at its end" not in said:
        said = process.stdout.readline()
    # To the whole group, as from a terminal.
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.1)
    gate.unlink()
    said = process.communicate()[0]
    assert "evaluate: interrupted at the end of the previous stage; dvc repro" in said
    assert "Traceback" not in said
    assert process.returncode == 255
    assert log.read_text().split() == ["train"]
    assert reproduce(fresh, log) == AFTER_TRAIN[1:]


def child_of(pid: int) -> int:
    [child] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert "stages.train" in Path(f"/proc/{child}/cmdline").read_text()
    return int(child)


def is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.fixture(scope="module")
def experiment(repository, log, tmp_path_factory):
    """dvc.lock, which has the MD5 of every output, of an experiment that nothing disturbed."""
    folder = tmp_path_factory.mktemp("experiment") / "repository"
    shutil.copytree(repository, folder, symlinks=True)
    command = ("dvc", "exp", "run", "--temp", "-q", "-n", "r8", "-S", "lora.r=8")
    must(folder, *command, STUB_GUARDED="1")
    return locked(folder, "r8")


def locked(folder: Path, name: str) -> str:
    refs = must(folder, "git", "for-each-ref", "--format=%(refname)", "refs/exps").split()
    return must(folder, "git", "show", f"{next(r for r in refs if r.endswith(name))}:dvc.lock")


def test_experiment_killed_in_a_copy_ends_like_an_undisturbed_one(fresh, log, experiment):
    command = ("dvc", "exp", "run", "--temp", "-q", "-S", "lora.r=8", "-n")
    with paused(fresh, log, "train", *command, "killed") as process:
        stage = child_of(process.pid)
        assert checkpoints_lie_in(fresh, stage)
        process.kill()
        ends(stage)
    must(fresh, *command, "again", STUB_GUARDED="1")
    assert log.read_text().split()[-len(AFTER_TRAIN) :] == AFTER_TRAIN
    assert locked(fresh, "again") == experiment
    assert must(fresh, "git", "status", "--porcelain") == ""


def test_experiment_killed_in_the_queue_ends_like_an_undisturbed_one(fresh, log, experiment):
    queue = ("dvc", "exp", "run", "--queue", "-q", "-S", "lora.r=8", "-n")
    must(fresh, *queue, "killed")
    with halted(log, "train"):
        # The worker goes into the background and would keep a pipe open.
        start = ("dvc", "queue", "start", "-q")
        env = os.environ | {"STUB_GUARDED": "1"}
        subprocess.run(start, cwd=fresh, env=env, check=True, stdout=subprocess.DEVNULL)
        while "train" not in log.read_text().split():
            time.sleep(0.01)
        [stage] = stages_in(fresh)
        assert checkpoints_lie_in(fresh, stage)
        os.kill(parent_of(stage), signal.SIGKILL)
        ends(stage)
    wait_for(fresh, "Failed")
    must(fresh, *queue, "again")
    must(fresh, "dvc", "queue", "start", "-q", STUB_GUARDED="1")
    wait_for(fresh, "Success")
    assert locked(fresh, "again") == experiment


def checkpoints_lie_in(folder: Path, pid: int) -> bool:
    """Whether DVC tells a stage in a temporary copy where the project is."""
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return f"DVC_ROOT={folder}".encode() in environment


def stages_in(folder: Path) -> list[int]:
    """Processes of stages that run in copies of the project."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            inside = (process / "cwd").resolve().is_relative_to(folder / ".dvc/tmp/exps")
            if inside and b"stages." in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def ends(pid: int) -> None:
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and not is_zombie(pid):
        assert time.monotonic() < deadline, "the stage lives on"
        time.sleep(0.01)


def wait_for(folder: Path, status: str, count: int = 1, again=None) -> None:
    """Wait until so many tasks of the queue have a status, without starting `dvc` each time.

    again  called if that takes long: DVC's worker may die of a message that it reads while it is
           being written (kombu's filesystem transport); starting a live one does nothing
    """
    began, shown = time.monotonic(), []
    while [task["status"] for task in shown].count(status) < count:
        waited = time.monotonic() - began
        assert waited < 120, shown
        if again and waited > 60:
            again()
            again = None
        time.sleep(0.2)
        with Repo(str(folder)) as repo:
            shown = repo.experiments.celery_queue.status()


def test_second_run_says_who_holds_the_lock(fresh, log):
    change(fresh, "stages/train.py", 1)
    with paused(fresh, log, "train") as process:
        second = run(fresh, "dvc", "repro")
    assert second.returncode == 255
    assert f"(PID {process.pid})" in second.stderr
    assert process.returncode == 0, process.stdout.read()


@pytest.mark.parametrize("seen", [True, False], ids=["time changed", "time kept"])
def test_repair_throws_the_damaged_file_out_of_the_cache(fresh, log, seen):
    file = fresh / "models/quantized/data.bin"
    must(fresh, "dvc", "checkout", "-q", "--relink")
    assert file.stat().st_nlink > 1
    whole, times = file.read_text(), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    file.chmod(0o644)
    file.write_text(whole[:-1] + ("0" if whole[-1] != "0" else "1"))
    if not seen:
        os.utime(file, ns=times)
    file.chmod(0o444)
    change(fresh, "stages/train.py", 1)
    # What a user would try first; DVC restores the damaged file.
    must(fresh, "dvc", "repro", "-q", "--force", "--single-item", "quantize", STUB_GUARDED="1")
    assert file.read_text() != whole
    must(fresh, "python", "-m", "tools.repair", "quantize", STUB_GUARDED="1")
    assert file.read_text() == whole
    must(fresh, "dvc", "repro", "-q", STUB_GUARDED="1")
    assert file.read_text() == whole


def test_repair_takes_from_the_cache_what_is_whole_there(fresh, log):
    file = fresh / "models/base/data.bin"
    whole = file.read_text()
    file.unlink()
    file.write_text("damaged")
    said = must(fresh, "python", "-m", "tools.repair", "fetch_model", STUB_GUARDED="1")
    assert "repair: recreating models/base" in said
    assert file.read_text() == whole
    assert log.read_text() == ""


def test_an_adapter_from_elsewhere_takes_the_place_of_the_trained_one(fresh, log):
    """As the README says."""
    adapter = fresh / "models/adapter"
    shutil.rmtree(adapter)
    adapter.mkdir()
    (adapter / "data.bin").write_text("from elsewhere")
    must(fresh, "dvc", "commit", "-q", "--force", "train")
    assert reproduce(fresh, log) == AFTER_TRAIN[1:]
    assert (adapter / "data.bin").read_text() == "from elsewhere"


def test_what_is_computed_is_kept_where_only_code_moved(fresh, log):
    """As the CHANGELOG says: all code is edited, and merge alone writes other bytes."""
    for name in [f"stages/{stage}.py" for stage in ALL] + ["stages/shared/process.py"]:
        change(fresh, name, 1)
    must(fresh, "dvc", "commit", "-q", "--force", *ALL[: ALL.index("merge")])
    assert reproduce(fresh, log) == ["merge", "verify", "export"]


def test_added_data_is_content_of_the_project(fresh):
    """DVC neither pushes files that it does not track nor copies them for an experiment."""
    data = fresh / "data/source/mine.jsonl"
    data.write_text("{}\n")
    must(fresh, "dvc", "add", "-q", "data/source/mine.jsonl")
    commit(fresh, "data")
    tracked = must(fresh, "git", "ls-files", "data").split()
    assert tracked == ["data/source/README.md", "data/source/mine.jsonl.dvc"]
    data.unlink()
    must(fresh, "dvc", "checkout", "-q")
    assert data.read_text() == "{}\n"


def recover(folder: Path) -> str:
    return must(folder, "python", "-m", "tools.recover")


DEAD = {"pid": 2**22 + 1, "cmd": "dvc repro"}
# The PID belongs to another program by now: this process.
TAKEN = {"pid": os.getpid(), "cmd": "dvc repro"}
RWLOCKS = {
    "empty": ("", "was broken, removed"),
    "cut": (json.dumps({"write": {"models/adapter": DEAD}})[:-9], "was broken, removed"),
    "odd": ('{"write": {"models/adapter": 3}}', "was broken, removed"),
    "infinite": ('{"write": {"a": {"pid": 1e400, "cmd": "x"}}}', "was broken, removed"),
    "deep": ("[" * 10**5, "was broken, removed"),
    "dead": (
        json.dumps({"read": {"stages/train.py": [DEAD]}}),
        "processes that are gone; removed those entries",
    ),
    "taken": (
        json.dumps({"write": {"data/raw": TAKEN}}),
        "processes that are gone; removed those entries",
    ),
}


def test_list_of_busy_paths_is_mended(fresh, log):
    """A kill of dvc, or the end of its container, leaves each of these."""
    change(fresh, "seed", 3)
    for content, said in RWLOCKS.values():
        (fresh / ".dvc/tmp/rwlock").write_text(content)
        assert recover(fresh) == f"recover: .dvc/tmp/rwlock {'named ' * ('gone' in said)}{said}\n"
        assert recover(fresh) == ""
    assert reproduce(fresh, log) == STALE["seed"]


def test_list_of_busy_paths_of_a_living_dvc_stays(fresh, log):
    change(fresh, "stages/train.py", 1)
    with paused(fresh, log, "train") as process:
        listed = (fresh / ".dvc/tmp/rwlock").read_text()
        assert str(process.pid) in listed
        assert recover(fresh) == ""
        assert (fresh / ".dvc/tmp/rwlock").read_text() == listed
    assert process.returncode == 0, process.stdout.read()


@pytest.mark.parametrize(("cut", "committed"), [(True, True), (False, False)])
def test_work_that_a_broken_lock_file_recorded_is_not_done_again(fresh, log, cut, committed):
    """DVC writes dvc.lock in place, so a kill leaves it empty or truncated."""
    if not committed:
        must(fresh, "git", "rm", "-q", "--cached", "dvc.lock")
    change(fresh, "lora", 5)
    assert reproduce(fresh, log) == STALE["lora"]
    made, lock = (fresh / "models/release/data.bin").read_text(), fresh / "dvc.lock"
    whole = lock.read_bytes()
    # Within a key.
    lock.write_bytes(whole[: whole.index(b": ", 4096) - 1] if cut else b"")
    said = recover(fresh)
    assert said.startswith(f"recover: dvc.lock is {'cut off' if cut else 'empty'}; moved to ")
    assert ("Git's is in its place" in said) == committed
    assert recover(fresh) == ""
    assert reproduce(fresh, log) == []
    assert (fresh / "models/release/data.bin").read_text() == made
    assert lock.read_bytes() == whole


def test_lock_file_cut_at_any_byte_is_noticed_or_says_nothing_false(repository, monkeypatch):
    monkeypatch.chdir(repository)
    whole = (repository / "dvc.lock").read_bytes()
    stages = declared_outs()
    assert broken(whole, whole, stages) is None
    full = yaml.safe_load(whole)["stages"]
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for size in {*range(0, len(whole), 997), *ends[-40:-1]}:
        if broken(whole[:size], whole, stages):
            continue
        for name, stage in yaml.safe_load(whole[:size])["stages"].items():
            pairs = zip(stage["outs"], full[name]["outs"], strict=True)
            assert all(out.items() <= entry.items() for out, entry in pairs)


def test_what_dvc_left_half_written_is_no_obstacle(fresh, log):
    """As `make repro` runs it; tests/chaos does more of it."""
    change(fresh, "stages/evaluate.py", 7)
    killed = ("python", str(ROOT / "tests/chaos/dvc_killed.py"))
    for path, at, size, left in (
        (".dvc/tmp/rwlock", "1", "0", 0),
        ("dvc.lock", "1", "4096", 4096),
        ("dvc.lock", "1", "0", 0),
    ):
        done = run(fresh, *killed, path, at, size, "repro", STUB_GUARDED="1")
        assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
        assert (fresh / path).stat().st_size in range(left, left + 200)
        assert recover(fresh) != ""
    assert reproduce(fresh, log) == ["export"]
    assert must(fresh, "git", "status", "--porcelain", "--", "models", "data") == ""


@pytest.mark.parametrize("content", ["", "[", "stages: 5", "stages: {plan: {outs: 5}}", "[" * 9999])
def test_a_lock_file_stays_where_dvc_yaml_says_nothing_of_it(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").write_text(content)
    (tmp_path / "dvc.lock").write_text("cut")
    with pytest.raises(SystemExit, match=r"^recover: dvc.yaml cannot be read; mend it first"):
        recover_dvc_lock()
    assert (tmp_path / "dvc.lock").read_text() == "cut"


def test_a_lock_file_that_is_no_file_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("dvc.lock")
    with pytest.raises(SystemExit, match=r"^recover: dvc\.lock is not a file"):
        recover_dvc_lock()


def test_conflict_in_the_lock_file_is_for_its_owner(fresh):
    lock = fresh / "dvc.lock"
    lock.write_text(lock.read_text().replace("stages:\n", "<<<<<<< HEAD\nstages:\n", 1))
    before = lock.read_text()
    done = run(fresh, "python", "-m", "tools.recover")
    assert (done.returncode, lock.read_text()) == (1, before)
    assert done.stderr.startswith("recover: dvc.lock has a merge conflict; take one side")


def test_repair_of_no_stage(fresh):
    done = run(fresh, "python", "-m", "tools.repair", "train2")
    assert done.returncode == 1
    assert done.stderr.startswith("repair: dvc.lock has no stage train2; it has fetch_model, ")


def test_repair_of_what_was_never_made(fresh):
    """A stage that runs by itself in a fresh clone recommends it."""
    for made in ("models/base", "models/quantized"):
        shutil.rmtree(fresh / made)
    done = run(fresh, "python", "-m", "tools.repair", "quantize")
    assert done.returncode == 1
    assert done.stderr == (
        "repair: models/base, which quantize reads, is missing too; recreate all of it with: "
        "dvc repro quantize\n"
    )


def test_second_run_changes_nothing(fresh, log):
    before = must(fresh, "git", "status", "--porcelain")
    assert reproduce(fresh, log) == []
    assert must(fresh, "git", "status", "--porcelain") == before == ""


def test_pull_with_what_a_remote_lacks(fresh, log, tmp_path):
    """Merged and released models are not pushed; a clone recreates only these."""
    must(fresh, "dvc", "remote", "add", "-d", "store", str(tmp_path / "store"))
    commit(fresh, "remote")
    must(fresh, "dvc", "push", "-q")
    must(tmp_path, "git", "clone", "-q", str(fresh), "clone")
    clone = tmp_path / "clone"
    change(clone, "verify", 1)
    log.write_text("")
    must(clone, "dvc", "repro", "-q", "--pull")
    assert log.read_text().split() == STALE["merge"]
