"""The schema of params.yaml: it accepts or refuses, and never changes a value.

No field has a default and nothing is derived, so no stage's result depends on this file and
none lists it in dvc.yaml.
"""

import difflib
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

PARAMS = Path("params.yaml")


def _number(value: Any) -> Any:
    # Pydantic would take true for 1.
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _text(value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError("must be text; put it in quotes")
    if value != value.strip() or not value or "\0" in value:
        raise ValueError("must be text without surrounding spaces")
    return value


Count = Annotated[int, BeforeValidator(_number), Field(ge=1)]
Share = Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1)]
NotNegative = Annotated[float, BeforeValidator(_number), Field(ge=0)]
Positive = Annotated[float, BeforeValidator(_number), Field(gt=0)]
Text = Annotated[str, BeforeValidator(_text)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Model(Section):
    source: Literal["hub", "local", "pypi"]
    id: Text
    revision: Text | None

    @model_validator(mode="after")
    def _revision_fits_source(self):
        if self.source == "local" and self.revision is not None:
            raise ValueError("revision: must be null for a local folder")
        if self.source != "local" and self.revision is None:
            raise ValueError("revision: must name a commit (hub) or a version (pypi)")
        return self


class Dataset(Model):
    config: Text | None
    split: Text | None

    @model_validator(mode="after")
    def _fits_source(self):
        if self.source != "hub" and (self.config or self.split):
            raise ValueError("config and split: must be null unless source is hub")
        inside = Path(self.id).parts[:2] == ("data", "source") and ".." not in Path(self.id).parts
        if self.source == "local" and not inside:
            raise ValueError("id: a local data set must lie in data/source, which DVC watches")
        return self


class Prepare(Section):
    format: Literal[
        "auto", "text", "prompt_completion", "alpaca", "messages", "sharegpt", "rendered"
    ]
    columns: dict[Text, Text] | None
    template: Text
    loss_on: Literal["completion", "assistant", "all"]
    max_length: Annotated[int, BeforeValidator(_number), Field(ge=8)]
    too_long: Literal["drop", "truncate", "split", "error"]
    train_rows: Count | None
    eval_rows: Count
    eval_file: Text | None
    group_by: Text | None
    near_duplicates: bool


class Plan(Section):
    vram_limit_gb: Positive | None


class Quantize(Section):
    type: Literal["nf4", "none"]
    double_quant: bool


class Lora(Section):
    r: Annotated[int, BeforeValidator(_number), Field(ge=1, le=4096)]
    alpha: Positive
    dropout: Share
    target_modules: Literal["all-linear"] | Annotated[list[Text], Field(min_length=1)]


class Train(Section):
    epochs: Positive
    batch_size: Count
    gradient_accumulation: Count
    learning_rate: Annotated[float, BeforeValidator(_number), Field(gt=0, le=1)]
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"]
    warmup_ratio: Share
    weight_decay: NotNegative
    max_grad_norm: Positive
    optimizer: Literal["adamw_torch_fused", "paged_adamw_32bit", "paged_adamw_8bit"]
    gradient_checkpointing: bool
    batching: Literal["group_by_length", "packing", "shuffle"]
    attention: Literal["auto", "sdpa", "eager", "varlen", "flash_attention_2"]
    report_to: Literal["none", "tensorboard"]

    @model_validator(mode="after")
    def _constant_has_no_warmup(self):
        if self.schedule == "constant" and self.warmup_ratio > 0:
            raise ValueError("warmup_ratio: must be 0, or schedule constant_with_warmup")
        return self


class Evaluate(Section):
    samples: Annotated[int, BeforeValidator(_number), Field(ge=0)]


class Merge(Section):
    base: Literal["dequantized", "original"]
    dtype: Literal["float16", "bfloat16"]


class Verify(Section):
    max_perplexity_change_percent: Positive
    compare_bases: bool


class Params(Section):
    seed: Annotated[int, BeforeValidator(_number), Field(ge=0, lt=2**32)]
    model: Model
    dataset: Dataset
    prepare: Prepare
    plan: Plan
    quantize: Quantize
    lora: Lora
    train: Train
    evaluate: Evaluate
    merge: Merge
    verify: Verify


class _Loader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys in silence; this one refuses the second."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def known_keys(section: type[Section] = Params, prefix: str = "") -> list[str]:
    """Every key of the schema in dotted form, such as `lora.r`."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _message(error: dict) -> str:
    """One pydantic error as `key: what is wrong (got value)`."""
    kind, context, got = error["type"], error.get("ctx", {}), error["input"]
    # Pydantic names the union member it tried after the field: keep the field's own path.
    path = [str(part) for part in error["loc"]]
    while len(path) > 1 and ".".join(path) not in known_keys() and kind != "extra_forbidden":
        path.pop()
    key = ".".join(path)
    if kind == "missing":
        return f"{key}: missing"
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(key, known_keys(), 1, 0.5) or difflib.get_close_matches(
            path[-1], [k.rsplit(".")[-1] for k in known_keys()], 1, 0.5
        )
        return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    if kind == "value_error" and isinstance(got, dict):
        return f"{key}.{context['error']}"
    rule = {
        "greater_than_equal": "must be {ge} or more",
        "greater_than": "must be more than {gt}",
        "less_than": "must be less than {lt}",
        "less_than_equal": "must be {le} or less",
        "literal_error": "must be {expected}",
        "value_error": "{error}",
        "int_parsing": "must be a whole number",
        "int_type": "must be a whole number",
        "int_from_float": "must be a whole number",
        "float_parsing": "must be a number",
        "float_type": "must be a number",
        "finite_number": "must be a finite number",
        "bool_parsing": "must be true or false",
        "bool_type": "must be true or false",
        "too_short": "must have at least {min_length} entry",
        "model_type": "must be a section with keys",
        "dict_type": "must be a mapping of column names",
        "list_type": "must be a list",
    }.get(kind, re.sub("^Input should be", "must be", error["msg"]))
    shown = repr(got) if len(repr(got)) <= 60 else repr(got)[:57] + "..."
    near = ""
    if kind == "literal_error" and isinstance(got, str):
        options = re.findall(r"'([^']+)'", context["expected"])
        close = difflib.get_close_matches(got, options, 1, 0.5)
        near = f"; did you mean {close[0]}?" if close else ""
    return f"{key}: {rule.format(**context)} (got {shown}){near}"


def faults(text: str) -> list[str]:
    """What is wrong with a params.yaml of this text, one line each; empty when nothing is."""
    try:
        raw = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        return [f"{where}not valid YAML: {error.problem}"]
    except yaml.YAMLError as error:
        return [f"not valid YAML: {str(error).splitlines()[0]}"]
    if not isinstance(raw, dict):
        return ["must be a mapping of sections"]
    try:
        Params.model_validate(raw)
    except ValidationError as error:
        # A union reports one error for each member; the first line of a key says enough.
        lines = {line.split(":")[0]: line for line in map(_message, reversed(error.errors()))}
        return list(reversed(lines.values()))
    return []


def load_params(path: Path = PARAMS) -> Params:
    """Read and check the whole file; print every fault in a line of its own and exit with 1."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        sys.exit(f"{path}: not found; run from the project's folder")
    except UnicodeDecodeError as error:
        sys.exit(f"{path}: not UTF-8 text (byte {error.start})")
    if found := faults(text):
        sys.exit("\n".join(f"{path}: {line}" for line in found))
    return Params.model_validate(yaml.load(text, _Loader))
