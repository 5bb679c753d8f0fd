"""Every test runs without a hub, with its caches in a folder of its own."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
# Stages run as `python -m …` from dvc.yaml: the tests' own interpreter must come first.
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
for _role in ("AUTHOR", "COMMITTER"):
    os.environ[f"GIT_{_role}_NAME"] = "Test"
    os.environ[f"GIT_{_role}_EMAIL"] = "test@example.com"


@pytest.fixture(autouse=True)
def isolated(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
