"""What all stages have in common: complete outputs or none, damage detected, one-line errors."""

import errno
import os
import queue
import shutil
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import quick
import yaml
from tiny import ROOT, append

from stages.shared import process
from stages.shared.interrupts import NOTE, interrupted_before, note_interrupt
from stages.shared.outputs import (
    SUMS,
    check_space,
    check_sums,
    read_json,
    whole_folder,
    write_metrics,
    write_sums,
    write_text,
)
from stages.shared.process import StageError, lock

pytestmark = pytest.mark.slow

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
MAKERS = {
    out if isinstance(out, str) else next(iter(out)): name
    for name, stage in STAGES.items()
    for out in stage.get("outs", [])
}
# Every stage with every folder it reads that another stage made.
READS = [
    (name, dep)
    for name, stage in STAGES.items()
    for dep in stage["deps"]
    if dep in MAKERS
    and not Path(dep).suffix
    # merge takes the base's weights only with merge.base: original, and the rows' tokenizer only
    # where the adapter brings none (tests/test_merge.py).
    and (name, dep) not in {("merge", "models/base"), ("merge", "data/prepared")}
]


@pytest.fixture
def workspace(finished, tmp_path) -> Path:
    folder = tmp_path / "ws"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("*.log"))
    return folder


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def repair(folder: str) -> str:
    return f"repair it with: python -m tools.repair {MAKERS[folder]}"


@pytest.mark.parametrize(("name", "folder"), READS, ids=[f"{n} {f}" for n, f in READS])
def test_stage_names_the_damaged_file_that_it_reads(workspace, name, folder):
    files = [file for file in (workspace / folder).rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    flip(largest)
    for out in MAKERS:
        if MAKERS[out] == name:
            path = workspace / out
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    stage = quick.Stage(name, workspace)
    assert stage.wait() == 1
    assert stage.said.splitlines()[-1] == (
        f"{name}: {largest.relative_to(workspace)} is damaged (its SHA-256 differs); "
        + repair(folder)
    )
    assert not any((workspace / out).exists() for out in MAKERS if MAKERS[out] == name)


@pytest.mark.parametrize("folder", [folder for folder in MAKERS if not Path(folder).suffix])
def test_damage_of_any_file_is_noticed(workspace, folder, monkeypatch):
    monkeypatch.chdir(workspace)
    check_sums(Path(folder), MAKERS[folder])
    names = [f for f in sorted(Path(folder).rglob("*")) if f.is_file() and f.name != SUMS]
    assert names
    for file in names:
        whole = file.read_bytes()
        for damage, said in (
            (lambda f: flip(f), "is damaged (its SHA-256 differs)"),
            (lambda f: os.truncate(f, f.stat().st_size - 1), "is damaged (its SHA-256 differs)"),
            (lambda f: os.truncate(f, 0), "is damaged (its SHA-256 differs)"),
            (lambda f: f.unlink(), "is missing"),
        ):
            damage(file)
            with pytest.raises(StageError) as refused:
                check_sums(Path(folder), MAKERS[folder])
            assert str(refused.value) == f"{file} {said}; {repair(folder)}"
            file.write_bytes(whole)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda sums: sums.unlink(), "SHA256SUMS is missing"),
        (lambda sums: sums.write_bytes(b"\xff" + sums.read_bytes()), "SHA256SUMS is damaged"),
        (lambda sums: sums.write_text(sums.read_text().replace("  ", " ")), "SHA256SUMS is damag"),
        (lambda sums: sums.write_text(sums.read_text()[:-4]), "b. is missing"),
        (lambda sums: sums.write_text(sums.read_text().split("\n")[0] + "\n"), "b.txt is not in "),
        (lambda sums: sums.write_bytes(b""), "a.txt is not in "),
        (lambda sums: (sums.parent / "c.py").touch(), "c.py is not in "),
    ],
    ids=["missing", "no text", "format", "cut in a line", "cut", "empty", "file too many"],
)
def test_damage_of_the_sums_themselves(tmp_path, damage, said):
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(name)
    write_sums(folder)
    check_sums(folder, "merge")
    damage(folder / SUMS)
    with pytest.raises(StageError, match=said) as refused:
        check_sums(folder, "merge")
    assert "repair it with: python -m tools.repair merge" in str(refused.value)
    assert "\n" not in str(refused.value)


ODD_NAMES = ["a\nb", "c\\d", "\\n", "e\rf", "u\u2028v", "w\x85x", "\x0b\x0c\x1c", "ä b", "\\\\\n"]


def test_odd_names_are_listed_as_sha256sum_does(tmp_path):
    for name in ODD_NAMES:
        (tmp_path / name).write_text(name)
    write_sums(tmp_path)
    check_sums(tmp_path, "fetch_data")
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS], cwd=tmp_path, check=True)
    names = [os.fsencode(name) for name in sorted(ODD_NAMES)]
    theirs = subprocess.run(["sha256sum", "--", *names], cwd=tmp_path, capture_output=True)
    assert (tmp_path / SUMS).read_bytes() == theirs.stdout
    flip(tmp_path / "a\nb")
    with pytest.raises(StageError, match="is damaged"):
        check_sums(tmp_path, "fetch_data")


def test_name_that_is_no_text_is_refused_with_it(tmp_path):
    (tmp_path / os.fsdecode(b"a\xff.jsonl")).touch()
    with pytest.raises(StageError, match=r"the name 'a\\udcff.jsonl' is not UTF-8; rename"):
        write_sums(tmp_path)


def break_off(out: Path, text: str, key: str | None = None) -> None:
    """Write a file into `out`, then fail."""

    def half() -> None:
        with whole_folder(out, key) as partial:
            (partial / "a").write_text(text)
            raise OSError("cut")

    with pytest.raises(OSError, match="cut"):
        half()


def test_folder_is_whole_or_as_it_was(tmp_path):
    out = tmp_path / "out"
    with whole_folder(out) as partial:
        (partial / "a").write_text("one")
    break_off(out, "two")
    assert (out / "a").read_text() == "one"
    with whole_folder(out) as partial:
        (partial / "b").write_text("three")
    assert sorted(path.name for path in out.iterdir()) == [SUMS, "b"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    check_sums(out, "merge")


def test_what_a_killed_run_left_is_removed(tmp_path):
    for name in (".out.partial", ".out.partial-old", ".out.partial-0123"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").touch()
    with whole_folder(tmp_path / "out") as partial:
        assert not list(partial.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_download_goes_on_under_the_same_key_alone(tmp_path):
    out = tmp_path / "out"
    break_off(out, "half", "commit1")
    with whole_folder(out, "commit2") as partial:
        assert not list(partial.iterdir())
        (partial / "other").touch()
    assert sorted(path.name for path in out.iterdir()) == [SUMS, "other"]
    break_off(out, "half", "commit1")
    with whole_folder(out, "commit1") as partial:
        assert [path.name for path in partial.iterdir()] == ["a"]


def test_files_are_readable_as_new_ones_are_but_links_stay(tmp_path):
    """DVC's cache is read-only: it never looks again at what it protects."""
    kept = tmp_path / "cache"
    kept.write_text("weights")
    kept.chmod(0o444)
    with whole_folder(tmp_path / "out") as partial:
        os.link(kept, partial / "linked")
        (partial / "own").touch(mode=0o600)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o444
    plain = tmp_path / "plain"
    plain.touch()
    assert (tmp_path / "out/own").stat().st_mode == plain.stat().st_mode


def test_text_does_not_go_through_a_link_into_the_cache(tmp_path):
    kept, path = tmp_path / "cache", tmp_path / "metrics.json"
    kept.write_text("old")
    os.link(kept, path)
    write_text(path, "new")
    assert (kept.read_text(), path.read_text()) == ("old", "new")
    path.unlink()
    path.symlink_to(kept)
    write_text(path, "new")
    assert (kept.read_text(), path.read_text()) == ("old", "new")


@pytest.mark.parametrize("content", [b"", b"[]", b"<<<<<<< HEAD\n{}", b"\xff", b"[" * 10**5, b"5"])
def test_a_damaged_file_of_the_pipeline_is_told_in_a_line(tmp_path, content):
    (tmp_path / "eval.json").write_bytes(content)
    with pytest.raises(StageError, match=r"eval.json: not a JSON object: it was edited or damaged"):
        read_json(tmp_path / "eval.json")


def test_metrics_are_json_that_any_tool_reads(tmp_path):
    path = tmp_path / "m.json"
    write_metrics(path, {"loss": 1 / 3, "steps": 3, "device": "CPU", "small": 1.23456789e-7})
    assert path.read_text() == (
        '{\n  "loss": 0.333333,\n  "steps": 3,\n  "device": "CPU",\n  "small": 1.23457e-07\n}\n'
    )
    for wrong in ("nan", "inf", "-inf"):
        with pytest.raises(StageError, match=rf"m\.json: loss is {wrong}, so the model"):
            write_metrics(path, {"steps": 4, "loss": float(wrong)})
    assert '"steps": 3' in path.read_text()


def test_space_is_looked_at_before(tmp_path):
    check_space(tmp_path, 1, "nothing")
    with pytest.raises(
        StageError, match=r"the adapter takes 1000000000\.00 GB, but .* GB are free"
    ):
        check_space(tmp_path, 10**18, "the adapter")


def test_lock_is_taken_over_from_a_run_that_removed_it(tmp_path, monkeypatch):
    """Otherwise the waiting run would hold a deleted file, and a third could hold the next one."""
    path, said = tmp_path / "run/lock", queue.Queue()
    monkeypatch.setattr(process, "print", lambda line, flush: said.put(line), raising=False)
    first = lock(path, "train")
    with ThreadPoolExecutor() as other:
        second = other.submit(lock, path, "train")
        line = said.get(timeout=60)
        assert line == f"train: waiting for process {os.getpid()}, which runs the same stage"
        shutil.rmtree(path.parent)
        first.close()
        assert os.path.samestat(os.fstat(second.result().fileno()), path.stat())
    assert said.empty()


# plan and verify write no more than text, as others do too.
LARGEST = {
    "fetch_model": 50_000,
    "fetch_data": 4_000,
    "prepare": 1_000,
    "quantize": 50_000,
    "train": 50_000,
    "evaluate": 1_000,
    "merge": 50_000,
    "export": 2_000,
}


@pytest.mark.parametrize("name", LARGEST)
def test_disk_that_takes_no_more(workspace, name):
    """Also in libraries written in Rust and C++, which do not raise OSError."""
    unmade = [out for out in MAKERS if MAKERS[out] == name]
    for out in unmade:
        path = workspace / out
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = files(workspace)
    stage = quick.Stage(name, workspace, largest_file=LARGEST[name])
    assert stage.wait() == 1
    last = stage.said.splitlines()[-1]
    assert last.startswith(f"{name}: ")
    assert last.endswith(
        "File too large; raise the limit on file sizes (ulimit -f) and run it again"
    )
    assert "Traceback" not in stage.said
    assert files(workspace) - before <= {f"{name}.log"} | finished_outs(name)


def finished_outs(name: str) -> set[str]:
    """Outputs of a stage that writes several, some of which may exist already."""
    kinds = ("outs", "metrics", "plots")
    paths = [out for kind in kinds for out in STAGES[name].get(kind, [])]
    return {out if isinstance(out, str) else next(iter(out)) for out in paths[:-1]}


def files(folder: Path) -> set[str]:
    skipped = (".dvc", "checkpoints")
    found = (path.relative_to(folder) for path in folder.rglob("*"))
    return {path.as_posix() for path in found if path.parts[0] not in skipped}


def test_a_folder_on_another_disk_is_refused_before_the_work(tmp_path, monkeypatch):
    """DVC refuses it too, but only after the run: its path leads out of the repository."""
    project, disk = tmp_path / "project", tmp_path / "disk"
    for folder in (project / "large", disk):
        folder.mkdir(parents=True)
    monkeypatch.chdir(project)
    (project / "models").symlink_to("large")
    entry = {"outs": ["models/base"], "metrics": [{"metrics/x.json": {"cache": False}}]}
    process._check_writable(entry)
    (project / "models").unlink()
    (project / "models").symlink_to(disk)
    with pytest.raises(StageError) as error:
        process._check_writable(entry)
    assert str(error.value).startswith(f"models leads to {disk}, outside the project, where DVC")


@pytest.mark.parametrize("name", STAGES)
def test_folder_that_may_not_be_written_is_refused_before_the_work(workspace, name):
    out = next(out for out in MAKERS if MAKERS[out] == name)
    parent = (workspace / out).parent
    parent.chmod(0o555)
    try:
        stage = quick.Stage(name, workspace, privileged=False)
        assert stage.wait() == 1
    finally:
        parent.chmod(0o755)
    assert stage.said == (
        f"{name}: {parent.relative_to(workspace)}: Permission denied; "
        "fix its permissions (chown, chmod) and run it again\n"
    )


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "No space left on device; make room and run it again"),
        (errno.EDQUOT, "Disk quota exceeded; make room and run it again"),
        (errno.EROFS, "Read-only file system; make it writable"),
    ],
)
def test_refusals_of_the_disk(number, said, monkeypatch, capsys):
    monkeypatch.setitem(process._begun, "writing", Path("models/merged"))
    rust = Exception(f"Error while serializing: I/O error: {os.strerror(number)} (os error 1)")
    for error in (OSError(number, os.strerror(number)), rust):
        process._report("merge", type(error), error, None)
        assert capsys.readouterr().err.startswith(f"merge: models/merged: {said}")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory (RAM); close other programs or use a smaller"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
            "out of memory (RAM); close other programs or use a smaller",
        ),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), "out of GPU memory; see with"),
        (KeyboardInterrupt(), "interrupted"),
        (ModuleNotFoundError(name="torch"), f"{sys.executable} has no module torch; activate"),
        (StageError("it is so"), "it is so"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_faults_of_the_surroundings_are_one_line(error, said, capsys):
    process._report("train", type(error), error, None)
    told = capsys.readouterr().err
    assert told.startswith(f"train: {said}")
    assert told.count("\n") == 1


def test_no_fault_in_finding_the_advice_is_shown(tmp_path, monkeypatch, capsys):
    """dvc.lock, dvc.yaml or the cache may be the broken file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_STAGE", "train")
    for broken in ("", "stages: [", "stages: 3\n", "stages: {train: {outs: [{path: 1}]}}\n"):
        (tmp_path / "dvc.lock").write_text(broken)
        process._report("train", StageError, StageError("no"), None)
        assert capsys.readouterr().err == "train: no\n"


def test_fault_of_the_code_keeps_its_traceback(capsys):
    try:
        _ = {}["key"]
    except KeyError as error:
        process._report("train", KeyError, error, error.__traceback__)
    assert "Traceback" in capsys.readouterr().err


def test_outputs_of_before_can_be_had_back(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_STAGE", "train")
    entry = "{outs: [{path: models/adapter, md5: 0011.dir}]}"
    (tmp_path / "dvc.lock").write_text(f"stages: {{train: {entry}}}\n")
    (tmp_path / "dvc.yaml").write_text(
        "stages: {train: {outs: [models/adapter]}, merge: {outs: [models/merged]}}\n"
    )
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], check=True)

    def told(name):
        process._report(name, StageError, StageError("no"), None)
        return capsys.readouterr().err.splitlines()

    # As in a fresh clone.
    assert told("train") == ["train: no"]
    (tmp_path / ".dvc/cache/files/md5/00").mkdir(parents=True)
    (tmp_path / ".dvc/cache/files/md5/00/11.dir").write_text("[]")
    assert told("merge") == ["merge: no"]
    assert told("train")[1] == (
        "train: restore the earlier outputs with: "
        "git checkout params.yaml dvc.lock metrics && dvc checkout"
    )


CHANGES = {
    "params.yaml: merge": lambda ws: edit(ws / "params.yaml", "dtype: float16", "dtype: bfloat16"),
    "stages/shared/merging.py": lambda ws: append(ws / "stages/shared/merging.py", "#\n"),
    "dvc.yaml: merge": lambda ws: edit(ws / "dvc.yaml", "Merge the adapter", "Put the adapter"),
    "models/adapter": lambda ws: os.utime(ws / "models/adapter/adapter_config.json"),
    "an input": lambda ws: (ws / "params.yaml").write_text("merge: [\n"),
}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("changed", CHANGES)
def test_result_of_other_inputs_is_not_kept(workspace, changed):
    """DVC would record the result with the new content of the files."""
    shutil.rmtree(workspace / "models/merged")
    stage = quick.Stage("merge", workspace)
    assert stage.until(lambda: (workspace / "models/.merged.partial").exists()), stage.said
    stage.kill(signal.SIGSTOP)
    assert (workspace / "models/.merged.partial").exists()
    CHANGES[changed](workspace)
    stage.kill(signal.SIGCONT)
    assert stage.wait() == 1
    last = stage.said.splitlines()[-1]
    assert last.startswith(
        f"merge: {changed} changed while the stage ran, so its result is not recorded; run it again"
    )
    assert not list((workspace / "models").glob("*merged*"))


def test_value_that_stands_there_during_the_imports_alone_is_not_computed_with(workspace):
    """Edited and reverted, which a check at the end cannot see."""
    shutil.rmtree(workspace / "models/merged")
    # The stage itself makes the edit where its slow imports begin, and takes it back.
    script, params = workspace / "stages/merge.py", workspace / "params.yaml"
    edit(
        script,
        "import torch\n",
        "kept = Path('params.yaml').read_text()\n"
        "Path('params.yaml').write_text(kept.replace('dtype: float16', 'dtype: bfloat16'))\n"
        "import torch\n",
    )
    edit(
        script,
        "    sources = read",
        "    Path('params.yaml').write_text(kept)\n    sources = read",
    )
    os.utime(script, (1e9, 1e9))
    before = params.read_text()
    assert "dtype: float16" in before
    stage = quick.run("merge", workspace)
    assert params.read_text() == before
    assert "models/quantized, float16" in stage.said


def test_edits_of_what_a_stage_does_not_read_are_nothing_to_it(workspace):
    stage = quick.Stage("merge", workspace)
    assert stage.until(lambda: (workspace / "models/.merged.partial").exists()), stage.said
    edit(workspace / "params.yaml", "samples: 2", "samples: 4")
    append(workspace / "stages/train.py", "#\n")
    assert stage.wait() == 0, stage.said


def test_stage_may_have_no_parameters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("seed: 42\n")
    (tmp_path / "dvc.yaml").write_text("stages: {notify: {cmd: python -m notify, deps: []}}\n")
    entry = {"cmd": "python -m notify", "deps": []}
    assert process._inputs("notify") == {"dvc.yaml: notify": entry}


def test_code_edited_during_the_imports_is_noticed(workspace):
    """The process may have read the old file or the new one."""
    script = workspace / "stages/fetch_data.py"
    edit(script, "begin(", "import os; os.utime(__file__); begin(")
    stage = quick.Stage("fetch_data", workspace)
    assert stage.wait() == 1
    assert stage.said == (
        "fetch_data: stages/fetch_data.py was edited while this stage started; run it again\n"
    )


def test_code_from_before_the_clock_was_set_back_is_no_edit(workspace):
    for file in (workspace / "stages").rglob("*.py"):
        os.utime(file, (2e9, 2e9))
    quick.run("fetch_data", workspace)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda: Path("dvc.lock").write_text("schema: '2.0'\nstages:\n  a:\n    md5: 01"),
            "dvc.lock is truncated; fix it with: python -m tools.recover",
        ),
        (lambda: Path("dvc.lock").touch(), "dvc.lock is truncated; fix it"),
        (note_interrupt, "interrupted at the end of the previous stage; dvc repro continues"),
        (lambda: Path("{a}").mkdir() or os.chdir("{a}"), "DVC cannot keep files below a path"),
    ],
    ids=["cut", "empty", "interrupted", "braces"],
)
def test_stage_that_dvc_would_not_record_does_not_begin(tmp_path, monkeypatch, spoil, said):
    monkeypatch.chdir(tmp_path)
    spoil()
    # Run by hand, it is nobody's concern.
    process._check_dvc()
    monkeypatch.setenv("DVC_STAGE", "train")
    with pytest.raises(StageError, match=said):
        process._check_dvc()


def test_note_of_another_dvc_is_nothing_to_this_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    note_interrupt()
    said = NOTE.read_text().split("\n")
    NOTE.write_text("\n".join([f"{os.getppid()} 1", *said[1:]]))
    assert not interrupted_before()


def test_second_press_of_ctrl_c_ends_what_does_not_stop():
    code = (
        "import threading, time; from stages.shared.interrupts import hear_interrupts\n"
        "hear_interrupts()\n"
        "threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "try: print('begun', flush=True); time.sleep(600)\n"
        "except KeyboardInterrupt: print('heard', flush=True)\n"
    )
    process = subprocess.Popen(
        ["env", "--default-signal", sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    for word in ("begun", "heard"):
        assert process.stdout.readline() == f"{word}\n"
        process.send_signal(signal.SIGINT)
    assert process.wait(30) == -signal.SIGINT


def test_arguments_are_refused(workspace):
    """They would be ignored, and the run misunderstood."""
    done = subprocess.run(
        [sys.executable, "-m", "stages.fetch_data", "--revision=2"],
        cwd=workspace,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "fetch_data: takes no arguments, but was given --revision=2; change params.yaml\n"
    )


def test_stage_whose_dvc_is_gone_does_not_begin(workspace):
    """Killed between starting the stage and its first line, dvc can not tell it any more."""
    orphan = (
        "import os, sys, time\n"
        "if os.fork(): os._exit(0)\n"
        "os.setsid()\n"
        "time.sleep(0.2)\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'stages.fetch_data'])\n"
    )
    with (workspace / "orphan.log").open("w") as log:
        done = subprocess.Popen(
            [sys.executable, "-c", orphan],
            cwd=workspace,
            env=os.environ | {"DVC_STAGE": "fetch_data"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        done.wait()
    while "\n" not in (said := (workspace / "orphan.log").read_text()):
        time.sleep(0.01)
    assert said == "fetch_data: dvc ended before the stage started\n"


def test_a_name_is_on_the_disk_with_its_content(tmp_path, monkeypatch):
    """Files, folders and, after the renaming, the folder around them are synced, in this order."""
    done = []
    fsync, replace = os.fsync, os.replace

    def syncing(handle):
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def replacing(source, target):
        done.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replacing)
    with whole_folder(tmp_path / "out") as out:
        (out / "deep").mkdir()
        (out / "deep/file").write_text("content")
    until = done.index("out")
    assert {path.name for path in done[:until]} >= {out.name, "deep", "file", SUMS}
    assert done[until + 1 :] == [tmp_path]
    done.clear()
    write_text(tmp_path / "metric.json", "{}")
    assert Path(done[0]).name == ".metric.json.partial"
    assert done[1:] == ["metric.json", tmp_path]
