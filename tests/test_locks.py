"""The lock files satisfy pyproject.toml, are complete, and match this environment."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tiny import ROOT

from tools import lock

LOCKS = sorted(ROOT.glob("requirements*.lock"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ASKED = [*PROJECT["project"]["dependencies"], *PROJECT["dependency-groups"]["dev"]]


def pinned(*files: str) -> dict[str, Requirement]:
    blocks = [block for file in files for block in lock.pins((ROOT / file).read_text()).values()]
    found = [Requirement(block.partition("\\")[0]) for block in blocks]
    assert all(re.fullmatch(r"==[^*]+", str(requirement.specifier)) for requirement in found)
    return {canonicalize_name(requirement.name): requirement for requirement in found}


EVERYTHING = pinned("requirements.lock", "requirements-torch.lock")


@pytest.mark.parametrize("asked", ASKED)
def test_what_is_asked_for_is_pinned(asked):
    requirement = Requirement(asked)
    pin = EVERYTHING[canonicalize_name(requirement.name)]
    assert next(iter(pin.specifier)).version in requirement.specifier


@pytest.mark.parametrize("file", LOCKS, ids=lambda file: file.name)
def test_every_pin_has_hashes_and_no_index_is_named(file):
    blocks = lock.pins(file.read_text())
    assert blocks
    text = "\n".join(line for line in file.read_text().splitlines() if line[:1] != "#")
    assert not re.search(r"://|^\s*-[^-]|--(?!hash=sha256:[0-9a-f]{64}\b)", text, re.MULTILINE)
    without = [name for name, block in blocks.items() if "--hash=sha256:" not in block]
    assert without == (["torch"] if file.name == "requirements-torch.lock" else [])


def test_this_environment_is_the_lock_s():
    """Every pin that concerns this machine is installed, and needs nothing beside the locks and
    what torch itself brings."""
    missing = {}
    for name, pin in EVERYTHING.items():
        if pin.marker and not pin.marker.evaluate():
            continue
        found = importlib.metadata.distribution(name)
        if not pin.specifier.contains(found.version, prereleases=True):
            missing[name] = found.version
        for text in found.requires or [] if name != "torch" else []:
            needed = Requirement(text)
            concerns = needed.marker is None or needed.marker.evaluate({"extra": ""})
            if concerns and canonicalize_name(needed.name) not in EVERYTHING:
                missing[name] = text
    assert missing == {}


def test_what_uv_resolved_is_divided():
    resolved = (
        "cuda-toolkit==13.0 ; sys_platform == 'linux' \\\n    --hash=sha256:1\n"
        "numpy==2.4 \\\n    --hash=sha256:2 \\\n    --hash=sha256:3\n"
        "nvidia-cublas==13.1 \\\n    --hash=sha256:4\n"
        "torch==2.13.0 ; sys_platform == 'linux' \\\n    --hash=sha256:5\n"
        "triton==3.7 \\\n    --hash=sha256:6\n"
        "torchmetrics==1.0 \\\n    --hash=sha256:7\n"
    )
    rest, torch = lock.divided(resolved)
    assert rest == (
        f"{lock.HEAD}numpy==2.4 \\\n    --hash=sha256:2 \\\n    --hash=sha256:3\n"
        "torchmetrics==1.0 \\\n    --hash=sha256:7\n"
    )
    assert torch == f"{lock.TORCH_HEAD}torch==2.13.0\n"


# In place of uv: it has the pins that the file had, and what was asked beside them.
UV = """\
import sys
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--output-file") + 1])
asked = sys.stdin.read().split() if sys.argv[-1] == "-" else ["numpy==2.4", "torch==2.13.0"]
if "--upgrade-package=bad" in sys.argv:
    sys.exit("error: no such\\nversion")
had = {line.split("==")[0]: line for line in out.read_text().splitlines() if line[0].isalpha()}
pins = {name.split("==")[0]: name for name in asked} | had
if "--upgrade" in sys.argv:
    pins["numpy"] = "numpy==3.0"
out.write_text("".join(f"{pin.split()[0]} \\\\\\n    --hash=sha256:0\\n" for pin in pins.values()))
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / ".uv/bin").mkdir(parents=True)
    uv = tmp_path / ".uv/bin/uv"
    uv.write_text(f"#!{sys.executable}\n{UV}")
    uv.chmod(0o755)
    (tmp_path / "pyproject.toml").write_text('[project]\nrequires-python = ">=3.11"\n')
    (tmp_path / "requirements.lock").write_text("numpy==2.3\n")
    for file in lock.BY_HAND:
        (tmp_path / file).write_text("# Whose.\nchardet==7.0\n")
    return tmp_path


def refresh(folder, *arguments):
    command = [sys.executable, "-m", "tools.lock", "--upgrade", *arguments]
    env = {"PYTHONPATH": str(ROOT), "PATH": ""}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_pins_stay_until_they_are_asked_to_move(project):
    done = refresh(project)
    assert (done.returncode, done.stderr) == (0, "")
    kept = f"{lock.HEAD}numpy==2.3 \\\n    --hash=sha256:0\n"
    assert (project / "requirements.lock").read_text() == kept
    by_hand = "# Whose.\nchardet==7.0 \\\n    --hash=sha256:0\n"
    assert [(project / file).read_text() for file in lock.BY_HAND] == [by_hand] * len(lock.BY_HAND)
    assert refresh(project).stdout == ""
    assert (project / "requirements.lock").read_text() == kept
    told = refresh(project, "all").stdout
    assert told == "lock: requirements.lock: numpy==2.3 -> numpy==3.0\n"


def test_what_cannot_be_resolved_changes_nothing(project):
    before = {file.name: file.read_bytes() for file in project.glob("*.lock")}
    done = refresh(project, "bad")
    assert done.returncode == 2
    assert done.stderr == (
        "lock: nothing was written; fix pyproject.toml or the pin it names: "
        "error: no such version\n"
    )
    assert {file.name: file.read_bytes() for file in project.glob("*.lock")} == before


def test_the_environment_is_made_of_hashed_files_alone():
    """All but torch's own file; the recipe is run by whoever makes an environment."""
    makefile = (ROOT / "Makefile").read_text()
    recipes = [line for line in makefile.splitlines() if re.search(r"-r (\$|req|/)", line)]
    assert recipes
    assert [r for r in recipes if not re.search("hashes|HASHED|TORCH_FROM", r)] == []
