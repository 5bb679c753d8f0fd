"""Every invalid params.yaml is refused first, with one line for each error."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from bad_params import GOOD, TABLE, mixed, with_value
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import PARAMS, ROOT

from stages.shared.params import Params, Section, faults, load_params, value_at
from stages.shared.params_errors import known_keys

STAGES = sorted(file.stem for file in (ROOT / "stages").glob("*.py") if file.stem != "__init__")
FILES = [ROOT / "params.yaml", PARAMS, *sorted((ROOT / "recipes").glob("*.yaml"))]


@pytest.mark.parametrize(("name", "text", "lines"), TABLE, ids=[row[0] for row in TABLE])
def test_bad_file_is_refused_in_one_line_a_fault(name, text, lines, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as refused:
        load_params()
    assert str(refused.value).split("\n") == [f"params.yaml: {line}" for line in lines]
    assert os.listdir(tmp_path) == ["params.yaml"]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"seed: \xff\n", "params.yaml: not UTF-8 text (byte 6)"),
        (b"seed: \xed\xa0\x80\n", "params.yaml: not UTF-8 text (byte 6)"),
        (None, "params.yaml: not found; run from the project's folder"),
        ("folder", "params.yaml: Is a directory"),
    ],
)
def test_file_that_is_no_text(content, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content == "folder":
        (tmp_path / "params.yaml").mkdir()
    elif content is not None:
        (tmp_path / "params.yaml").write_bytes(content)
    with pytest.raises(SystemExit, match=f"^{line.replace('(', '.').replace(')', '.')}$"):
        load_params()


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_refuses_before_it_imports_or_writes(stage, tmp_path):
    """Also the sections of other stages: an export setting must not fail after GPU hours."""
    shutil.copytree(ROOT / "stages", tmp_path / "stages", ignore=shutil.ignore_patterns("__py*"))
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    text = with_value("lora.r", "0", with_value("verify.compare_bases", "maybe"))
    (tmp_path / "params.yaml").write_text(text)
    before = sorted(tmp_path.rglob("*"))
    run = subprocess.run(
        [sys.executable, "-B", "-X", "importtime", "-m", f"stages.{stage}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    said = [line for line in run.stderr.splitlines() if not line.startswith("import time:")]
    assert said == [
        "params.yaml: lora.r: must be 1 or more (got 0)",
        "params.yaml: verify.compare_bases: must be true or false (got 'maybe')",
    ]
    assert run.returncode == 1
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert "pydantic" in imported
    assert not imported & {"torch", "transformers", "datasets", "pyarrow", "numpy", "jinja2"}
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("stage", STAGES)
def test_python_without_the_packages_is_one_line(stage):
    """As when the environment was not activated; without site there are no packages."""
    run = subprocess.run(
        [sys.executable, "-S", "-B", "-m", f"stages.{stage}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stderr == (
        f"{sys.executable} has no module pydantic; activate the project's environment first: "
        ". .venv/bin/activate\n"
    )
    assert run.returncode == 1


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_shipped_file_is_valid(file):
    assert faults(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        # What `dvc exp run -S train.learning_rate=1e-5` writes; YAML 1.1 reads it as text.
        ("train.learning_rate", "1e-05", 1e-5),
        ("train.learning_rate", "1E-5", 1e-5),
        ("train.epochs", "3", 3.0),
        # Octal in YAML 1.1: a stage would train at 8 while dvc.lock says 10.
        ("lora.r", "010", 10),
        ("lora.r", "0x10", 16),
        # A boolean in YAML 1.1.
        ("prepare.group_by", "yes", "yes"),
        ("prepare.group_by", "no", "no"),
        # Minutes and seconds in YAML 1.1.
        ("prepare.group_by", "1:30", "1:30"),
        ("lora.target_modules", "[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("prepare.template", r'"### {prompt}\n### Answer: "', "### {prompt}\n### Answer: "),
        ("prepare.template", "templates/chatml.jinja", "templates/chatml.jinja"),
        ("prepare.columns", "{prompt: 'Frage ?'}", {"prompt": "Frage ?"}),
        ("prepare.train_rows", "null", None),
        ("plan.vram_limit_gb", "24", 24.0),
    ],
)
def test_value_means_to_a_stage_what_it_means_to_dvc(key, written, value, tmp_path):
    from dvc.utils.serialize import load_yaml

    path = tmp_path / "params.yaml"
    path.write_text(with_value(key, written), encoding="utf-8")
    section, name = key.split(".")
    ours = getattr(getattr(load_params(path), section), name)
    assert ours == value
    assert type(ours) is type(value)
    assert load_yaml(path)[section][name] == value


def test_key_may_come_by_a_merge(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(GOOD.replace("  type: nf4\n", "  <<: {type: nf4}\n"))
    assert load_params(path).quantize.type == "nf4"


def sections(section=Params):
    yield section
    for field in section.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from sections(field.annotation)


def test_schema_has_no_default_and_derives_nothing():
    for section in sections():
        assert section.model_config["extra"] == "forbid"
        assert section.model_config["frozen"]
        assert not section.model_computed_fields
        for name, field in section.model_fields.items():
            assert field.is_required(), name


def test_no_parameter_has_a_name_that_the_run_cache_ignores():
    """DVC leaves `size` and `nfiles` out of the run cache's key: another value, the old result."""
    names = {part for key in known_keys(Params) for part in key.split(".")}
    assert len(names) > 40
    assert not names & {"size", "nfiles"}


@pytest.mark.parametrize(
    ("key", "value"), [("lora", 16), ("lora.r", None), ("train.r", None), ("seed", 1)]
)
def test_a_value_is_looked_up_where_a_section_may_be_a_number(key, value):
    assert value_at({"lora": 16, "train": {}, "seed": 1}, key) == value


def test_loaded_values_are_those_of_the_file():
    assert load_params(PARAMS).model_dump() == yaml.safe_load(GOOD)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["nf4", "hub", "data/source/x", "{prompt}", "all-linear", "1e-05", "yes"]),
    st.dates(),
    st.binary(max_size=4),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(key=st.sampled_from(known_keys(Params)), value=VALUES)
@example(key="model.id", value="\ud800")
def test_any_value_is_taken_or_refused_in_lines_that_name_it(key, value):
    section, _, name = key.rpartition(".")
    params = yaml.safe_load(GOOD)
    params["dataset"]["mix"] = json.loads(mixed(0.1))
    places = params | {"dataset.mix": params["dataset"]["mix"][0], "": params}
    places[section][name] = value
    check(yaml.safe_dump(params, allow_unicode=True), section or key)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_is_refused_in_lines(text):
    check(text, "")


def check(text: str, start: str) -> None:
    for line in faults(text):
        assert line.isprintable()
        assert line.startswith((start, "not valid YAML:", "line ", "must be a mapping"))
        line.encode("utf-8")
