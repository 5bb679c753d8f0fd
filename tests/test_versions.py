"""tools.versions names results made with other library versions, and the commands to renew them."""

import json

import pytest

from stages.shared.provenance import made_with, provenance, versions
from tools import versions as tool


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "metrics").mkdir()

    def record(stage, **changes):
        cost = {"seconds": 1.0, "device": "CPU, 2 cores"} | versions() | changes
        (tmp_path / tool.RECORDS[stage]).write_text(json.dumps(cost))

    return record


def status():
    try:
        tool.main()
    except SystemExit as ended:
        return ended.code
    return 0


def test_equal_versions_pass(recorded, capsys):
    for stage in tool.RECORDS:
        recorded(stage)
    assert status() == 0
    assert "installed versions" in capsys.readouterr().out


def test_another_version_is_named_with_what_to_run(recorded, capsys):
    recorded("quantize")
    recorded("train", torch_version="2.11.0", liger_kernel_version="0.1.0")
    recorded("merge", torch_version="2.11.0")
    assert status() == 1
    first, second, remedy = capsys.readouterr().out.splitlines()
    assert first.startswith("versions: train was made with torch 2.11.0, installed ")
    assert "liger_kernel 0.1.0, installed " in first
    assert second.startswith("versions: merge was made with torch 2.11.0")
    assert remedy.endswith("dvc repro --force --single-item train && dvc repro")


def test_nothing_recorded_is_not_all_alike(recorded, capsys):
    assert status() == 2
    assert "dvc repro" in capsys.readouterr().err


def test_provenance_is_flat_and_found_again():
    torch = pytest.importorskip("torch")
    facts = provenance(torch.device("cpu"))
    assert all(isinstance(value, str | int) for value in facts.values())
    assert facts["torch_version"] == torch.__version__
    assert made_with({"train_seconds": 1.0} | facts) == facts
