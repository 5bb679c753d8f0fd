"""A repository with the stages of dvc.yaml, parameters and shared code, which take no time.

Each stage is replaced by a stub that writes every output of the real one, with a hash of what it
depends on for content; the two permissions (models/plan.ok, models/verify.ok) are constant, as in
the real ones. Which stages run, and what DVC keeps, is therefore as in the real pipeline.
"""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import yaml
from tiny import PARAMS, ROOT

# Of the modules in dvc.yaml, which DVC takes all alike, those that some test edits: with all of
# them DVC reads and writes a dvc.lock of 1,600 lines at every stage, which takes half a second.
EDITED = ("stages/shared/process.py", "stages/training/trainer.py")
_MODULE = re.compile(r"    - (stages/\w+/\w+\.py)\n")
DVC_YAML = _MODULE.sub(
    lambda line: line[0] * (line[1] in EDITED), (ROOT / "dvc.yaml").read_text(encoding="utf-8")
)
PIPELINE = yaml.safe_load(DVC_YAML)["stages"]
STUB = '''\
"""Stub of {name}."""
import functools
import hashlib
import json
import os
import time
from pathlib import Path

NAME, DEPS, OUTS, METRICS, PLOTS, PARAMS = {facts!r}
GUARDED = "STUB_GUARDED" in os.environ
if GUARDED:
    from stages.shared.params import load_params
    from stages.shared.outputs import whole_folder, write_metrics, write_text
    from stages.shared.process import begin

    begin(NAME)
else:
    import yaml

with Path(os.environ["STUB_LOG"]).open("a") as log:
    log.write(NAME + "\\n")
digest = hashlib.sha256()
for dep in [*DEPS, __file__]:
    path = Path(dep)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file() and (file.suffix != ".py" or dep == __file__):
            digest.update(file.read_bytes())
params = load_params().model_dump() if GUARDED else yaml.safe_load(Path("params.yaml").read_text())
values = [functools.reduce(dict.__getitem__, key.split("."), params) for key in PARAMS]
digest.update(repr(values).encode())
content = digest.hexdigest()
if GUARDED and "STUB_FAILS" in os.environ:
    from stages.shared.process import StageError

    raise StageError("told to fail")
while GUARDED and Path(os.environ["STUB_LOG"] + "." + NAME).exists():
    time.sleep(0.01)


def text(path, value):
    if GUARDED:
        write_text(path, value)
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_text(value)


for out in OUTS:
    if Path(out).suffix:
        text(Path(out), "ok" if out.endswith(".ok") else content)
    elif GUARDED:
        with whole_folder(Path(out)) as folder:
            (folder / "data.bin").write_text(content)
    else:
        Path(out).mkdir(parents=True)
        (Path(out) / "data.bin").write_text(content)
for metric in METRICS:
    values = {{"value": int(content[:6], 16), "rate": params["train"]["learning_rate"]}}
    text(Path(metric), json.dumps(values))
for plot in PLOTS:
    text(Path(plot), "step,loss\\n1," + content[:4] + "\\n")


class Lingering:
    """Halts the process where Python takes itself apart."""

    def __del__(self, path=os.environ["STUB_LOG"] + "." + NAME + ".end", sleep=time.sleep, os=os):
        print("at its end", flush=True)
        while os.access(path, os.F_OK):
            sleep(0.01)


if GUARDED and Path(os.environ["STUB_LOG"] + "." + NAME + ".end").exists():
    import atexit

    kept = Lingering()
    if "STUB_AT_EXIT" in os.environ:
        # In a callback of a library, as of torch, that runs before those of begin.
        atexit.register(Lingering.__del__, kept)
'''


def make(folder: Path) -> Path:
    """A git repository in `folder` with one commit of the stubs, nothing run yet."""
    folder.mkdir(parents=True)
    for name in ("stages", "templates", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "dvc.yaml").write_text(DVC_YAML, encoding="utf-8")
    shutil.copy(PARAMS, folder / "params.yaml")
    (folder / "data/source").mkdir(parents=True)
    shutil.copy(ROOT / "data/source/README.md", folder / "data/source")
    for name, stage in PIPELINE.items():
        lists = [_paths(stage.get(kind, [])) for kind in ("deps", "outs", "metrics", "plots")]
        facts = (name, *lists, stage["params"])
        (folder / f"stages/{name}.py").write_text(STUB.format(name=name, facts=facts))
    must(folder, "git", "init", "-q", "-b", "main")
    must(folder, "dvc", "init", "-q")
    shutil.copy(ROOT / ".dvc/config", folder / ".dvc/config")
    (folder / "metrics").mkdir()
    commit(folder, "stubs")
    return folder


def _paths(entries: list) -> list[str]:
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def commit(folder: Path, message: str) -> None:
    must(folder, "git", "add", "-A")
    must(folder, "git", "commit", "-qm", message)


def must(folder: Path, *command: str, **env: str) -> str:
    done = run(folder, *command, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run(folder: Path, *command: str, **env: str) -> subprocess.CompletedProcess:
    """As with pipes, which the worker of DVC's queue would keep open until it ends."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        done = subprocess.run(
            command, cwd=folder, stdout=out, stderr=err, check=False, env=os.environ | env
        )
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(command, done.returncode, out.read(), err.read())
