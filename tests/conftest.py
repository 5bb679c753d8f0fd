"""Every test runs without the Hub, with its own cache folders."""

import fcntl
import gc
import itertools
import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
# Before torch is imported. In products of tiny matrices a second thread only waits.
os.environ["OMP_NUM_THREADS"] = "1"
# Threads of stages that wait for one another would spin on the cores that other tests need.
os.environ["OMP_WAIT_POLICY"] = "passive"
# Stages run as `python -m …` from dvc.yaml: the tests' own interpreter must come first.
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
for _role in ("AUTHOR", "COMMITTER"):
    os.environ[f"GIT_{_role}_NAME"] = "Test"
    os.environ[f"GIT_{_role}_EMAIL"] = "test@example.com"


# Files of more than half a minute, the longest first: one that began last would be waited for, and
# pytest-xdist puts those with few tests there.
LONGEST = [
    "test_dvc.py",
    "test_sweep.py",
    "test_recipes.py",
    "test_resume.py",
    "test_hostile.py",
    "test_ranks.py",
    "test_machines.py",
    "test_cards.py",
    "test_families.py",
    "test_process.py",
    "test_train.py",
    "test_verify.py",
    "test_merge.py",
    "test_prepare.py",
]


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_collection_finish():
    """Otherwise every full collection, also of a fork, would scan all that tests import."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def caches(tmp_path_factory):
    """Names of folders that do not exist yet: mktemp lists all earlier folders on each call."""
    folder = tmp_path_factory.mktemp("hf")
    return (str(folder / str(number)) for number in itertools.count())


@pytest.fixture(autouse=True)
def isolated(caches, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", next(caches))
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")


@pytest.fixture(scope="session")
def finished(tmp_path_factory, worker_id) -> Path:
    """A tiny workspace in which every stage has run. Copy it; it is shared, by all workers."""
    import quick
    import yaml
    from tiny import make_workspace

    place = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        place = place.parent
    with (place / "finished.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.fstat(lock.fileno()).st_size:
            shutil.rmtree(place / "finished", ignore_errors=True)
            folder = make_workspace(place / "finished/ws")
            for name in yaml.safe_load((folder / "dvc.yaml").read_text())["stages"]:
                quick.run(name, folder)
            lock.write("made")
    return place / "finished/ws"
