"""A task of a local file on a tiny base and release, without a network: make test-harness"""

import json
import os
import subprocess
import sys

import pytest
from tiny import ROOT, make_model, make_tokenizer

TASK = """\
task: boxes
dataset_path: json
dataset_kwargs:
  data_files: {test: FILE}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["yes", "no"]
doc_to_target: "{{answer}}"
metric_list:
- metric: acc
"""


@pytest.fixture
def project(tmp_path):
    for name, arch in (("base", "llama"), ("release", "llama")):
        folder = tmp_path / f"models/{name}"
        make_model(folder, arch, hidden_size=64 if name == "base" else 32)
        make_tokenizer(folder)
        (folder / "SHA256SUMS").write_text(f"{name}\n")
    (tmp_path / "metrics").mkdir()
    (tmp_path / "tasks").mkdir()
    rows = [{"question": f"Is {i} a box?", "answer": i % 2} for i in range(12)]
    data = tmp_path / "tasks/rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks/boxes.yaml").write_text(TASK.replace("FILE", str(data)))
    return tmp_path


def run(project, *arguments):
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), str(ROOT)]))
    return subprocess.run(
        [sys.executable, "-m", "tools.harness", *arguments],
        cwd=project,
        env=os.environ | {"PYTHONPATH": path, "HF_DATASETS_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_both_models_are_measured_by_a_task_of_ones_own(project):
    done = run(project, "--tasks", "boxes", "--include", "tasks", "--limit", "8")
    assert done.returncode == 0, done.stderr
    found = json.loads((project / "metrics/harness.json").read_text())
    assert {"base_boxes_acc", "tuned_boxes_acc", "limit"} <= found.keys()
    assert all(found[key] * 8 % 1 == 0 for key in ("base_boxes_acc", "tuned_boxes_acc"))


def test_an_unknown_task_is_one_line(project):
    done = run(project, "--tasks", "no_such_task")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2,
        "harness: no task no_such_task; lm-eval ls tasks lists them",
    )
    assert not list((project / "metrics").iterdir())
