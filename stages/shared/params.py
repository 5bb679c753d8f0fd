"""The schema of params.yaml: it accepts or refuses, and never changes a value.

No field has a default and nothing is derived, so no stage's result depends on this file and none
lists it in dvc.yaml. The YAML is read as by DVC (YAML 1.2: 1e-05 is a number, 010 is ten), so that
a stage computes with the values in dvc.lock.
"""

import ast
import functools
import sys
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from stages.shared.screen import brief

try:
    from pydantic import (
        BaseModel,
        BeforeValidator,
        ConfigDict,
        Field,
        ValidationError,
        model_validator,
    )
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    from stages.shared.params_errors import messages, near
except ModuleNotFoundError as error:
    # Every stage starts here, so this is where a wrong Python is noticed.
    sys.exit(
        f"{sys.executable} has no module {error.name}; activate the project's environment first: "
        ". .venv/bin/activate"
    )

PARAMS = Path("params.yaml")
# The file of the functions in evaluate.measures, and the built-in measures.
MEASURES = Path("stages/evaluating/measures.py")
STANDARD_MEASURES = ("exact_match", "rouge_l", "chrf", "json_valid", "answer_tokens", "ended")


def _characters(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be text; put it in quotes")
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("must be text that a file can hold")
    return value


def _text(value: Any) -> str:
    value = _characters(value)
    if value != value.strip() or not value:
        raise ValueError("must not be empty or have spaces around it")
    return value


def _auto_or_bool(value: Any) -> bool | str:
    if value is not True and value is not False and value != "auto":
        raise ValueError("must be auto, true or false")
    return value


def _template(value: Any) -> str:
    value = _characters(value)
    file = value.startswith("templates/") and value.endswith(".jinja") and ".." not in value
    if value != "chat" and not file and value.count("{prompt}") != 1:
        raise ValueError("must be chat, a file templates/….jinja, or text with {prompt} in it once")
    return value


def _target_modules(value: Any) -> str | list[str]:
    if value != "all-linear" and not (isinstance(value, list) and value):
        raise ValueError("must be all-linear or a list of module names")
    return value if value == "all-linear" else [_text(name) for name in value]


Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Text = Annotated[str, BeforeValidator(_text)]
Template = Annotated[str, BeforeValidator(_template)]
RowFormat = Literal[
    "auto", "text", "prompt_completion", "alpaca", "messages", "sharegpt", "rendered"
]
Columns = dict[Text, Text] | None


def measures_in(source: str) -> list[str]:
    """Names of the top-level functions of a Python file that do not begin with _."""
    functions = [n.name for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)]
    return [name for name in functions if not name.startswith("_")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def conflicts(self) -> list[str]:
        """Conflicts between values of this section, each as `key: what to do`."""
        return []

    @model_validator(mode="after")
    def _agrees_with_itself(self):
        if found := self.conflicts():
            raise ValueError("\n".join(found))
        return self


class Model(Section):
    source: Literal["hub", "local", "pypi"]
    id: Text
    revision: Text | None

    def conflicts(self) -> list[str]:
        if self.source == "local" and self.revision is not None:
            return ["revision: must be null for a local folder"]
        if self.source != "local" and self.revision is None:
            return ["revision: must name a commit (hub) or a version (pypi)"]
        return []


class Source(Model):
    # The section's name, for messages.
    section: ClassVar[str] = "dataset"
    config: Text | None
    split: Text | None

    def conflicts(self) -> list[str]:
        found = super().conflicts()
        if self.source != "hub":
            for key in ("config", "split"):
                if getattr(self, key) is not None:
                    found.append(f"{key}: must be null unless source is hub")
        parts = Path(self.id).parts
        if self.source == "local" and (parts[:2] != ("data", "source") or ".." in parts):
            found.append("id: a local data set must lie in data/source, which DVC watches")
        return found


class Mixed(Source):
    section: ClassVar[str] = "dataset.mix"
    share: Annotated[float, Field(gt=0, lt=1)]
    format: RowFormat
    columns: Columns


class Dataset(Source):
    mix: Annotated[list[Mixed], Field(min_length=1)] | None

    def conflicts(self) -> list[str]:
        found = super().conflicts()
        total = sum(Fraction(str(each.share)) for each in self.mix or [])
        if total >= 1:
            found.append(
                f"mix: the shares add up to {float(total):g} of the training rows, and leave none "
                f"for {self.id}; keep them below 1"
            )
        return found


class Retention(Source):
    section: ClassVar[str] = "retention"
    tokens: Count


class Prepare(Section):
    format: RowFormat
    columns: Columns
    template: Template
    loss_on: Literal["completion", "assistant", "all"]
    max_length: Annotated[int, Field(ge=8)]
    too_long: Literal["drop", "truncate", "split", "error"]
    train_rows: Count | None
    eval_rows: Count
    validation_rows: Annotated[int, Field(ge=0)]
    eval_file: Text | None
    group_by: Text | None
    near_duplicates: bool


class Plan(Section):
    vram_limit_gb: Positive | None


class Quantize(Section):
    type: Literal["nf4", "none"]
    double_quant: bool


class Lora(Section):
    r: Annotated[int, Field(ge=1, le=4096)]
    alpha: Positive
    scaling: Literal["standard", "rslora"]
    dropout: Share
    target_modules: Annotated[str | list[str], BeforeValidator(_target_modules)]
    experts: bool
    new_tokens: list[Text]

    def conflicts(self) -> list[str]:
        twice = {token for token in self.new_tokens if self.new_tokens.count(token) > 1}
        found = [f"new_tokens: {brief(token)} is named twice" for token in sorted(twice)]
        if self.experts and self.dropout:
            found.append("dropout: must be 0 with experts: true, where PEFT has none")
        return found


class Train(Section):
    epochs: Positive
    batch_size: Count
    gradient_accumulation: Count
    learning_rate: Annotated[float, Field(gt=0, le=1)]
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"]
    warmup_ratio: Share
    weight_decay: NotNegative
    max_grad_norm: Positive
    optimizer: Literal["adamw_torch_fused", "paged_adamw_32bit", "paged_adamw_8bit"]
    gradient_checkpointing: Annotated[bool | Literal["auto"], BeforeValidator(_auto_or_bool)]
    batching: Literal["group_by_length", "packing", "shuffle"]
    attention: Literal["auto", "sdpa", "eager", "varlen"]
    keep: Literal["last", "best"]
    patience: Count | None

    def conflicts(self) -> list[str]:
        if self.schedule == "constant" and self.warmup_ratio > 0:
            return ["warmup_ratio: must be 0, or schedule constant_with_warmup"]
        return []


class Tracking(Section):
    report_to: Literal["none", "tensorboard", "wandb", "mlflow"]


class Evaluate(Section):
    samples: Annotated[int, Field(ge=0)]
    max_answer_tokens: Count
    measures: list[Text]

    def conflicts(self) -> list[str]:
        if not self.measures:
            return []
        where = MEASURES.as_posix()
        try:
            there = measures_in((Path(__file__).parents[2] / MEASURES).read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError) as error:
            line = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
            reason = " ".join(str(getattr(error, "msg", error)).split())
            return [f"measures: {where}{line} cannot be read: {reason}"]
        found = []
        for name in self.measures:
            if name in STANDARD_MEASURES:
                found.append(f"measures: {name} is always taken; leave it out")
            elif name not in there:
                close = near(name, dict(zip(there, there, strict=True)), 0.6)
                found.append(f"measures: no function {brief(name)} in {where}{close}")
            elif self.measures.count(name) > 1:
                found.append(f"measures: {name} is named twice")
        return list(dict.fromkeys(found))


class Merge(Section):
    base: Literal["dequantized", "original"]
    dtype: Literal["float16", "bfloat16"]


class Verify(Section):
    max_perplexity_change_percent: Positive
    compare_bases: bool


class Export(Section):
    rows_in_card: Literal["public", "always", "never"]


class Params(Section):
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    model: Model
    dataset: Dataset
    retention: Retention | None
    prepare: Prepare
    plan: Plan
    quantize: Quantize
    lora: Lora
    train: Train
    tracking: Tracking
    evaluate: Evaluate
    merge: Merge
    verify: Verify
    export: Export

    def conflicts(self) -> list[str]:
        found = []
        if self.lora.experts and self.quantize.type != "nf4":
            found.append("lora.experts: true needs quantize.type: nf4")
        if self.prepare.validation_rows:
            return found
        broken = ["keep: must be last"] * (self.train.keep == "best")
        broken += ["patience: must be null"] * (self.train.patience is not None)
        return found + [f"train.{rule}, or prepare.validation_rows more than 0" for rule in broken]


@functools.cache
def read_yaml(text: str) -> Any:
    """Parse YAML 1.2 as DVC does. Cached; the result must not be changed."""
    return YAML(typ="safe", pure=True).load(text)


def faults(text: str) -> list[str]:
    """Errors in the text of a params.yaml, one line each."""
    try:
        raw = read_yaml(text)
    except MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        return [f"{where}not valid YAML: {error.problem.splitlines()[0]}"]
    except (YAMLError, ValueError) as error:
        return [f"not valid YAML: {str(error).splitlines()[0]}"]
    except RecursionError:
        return ["not valid YAML: nested too deeply"]
    if not isinstance(raw, dict):
        return ["must be a mapping of sections"]
    try:
        Params.model_validate(raw)
    except ValidationError as error:
        return [line for fault in error.errors() for line in messages(fault, Params)]
    return []


def value_at(params: dict, key: str) -> Any:
    """What a file's `params` say at `key`, a section or `section.key`; None where it is missing."""
    section, _, leaf = key.partition(".")
    value = params.get(section)
    if not leaf:
        return value
    return value.get(leaf) if isinstance(value, dict) else None


_kept: dict[Path, Params] = {}


def keep_params() -> None:
    """Let `load_params` return the file's current content from now on.

    A stage loads its parameters seconds later, after its imports. Otherwise a value that was there
    only for a moment could be used, while DVC records the one before and after it.
    """
    _kept[PARAMS] = load_params()


def load_params(path: Path = PARAMS) -> Params:
    """Read and validate the whole file; on errors, print each on a line and exit with 1."""
    if path in _kept:
        return _kept[path]
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        sys.exit(f"{path}: not UTF-8 text (byte {error.start})")
    except FileNotFoundError:
        sys.exit(f"{path}: not found; run from the project's folder")
    except OSError as error:
        sys.exit(f"{path}: {error.strerror}")
    if found := faults(text):
        sys.exit("\n".join(f"{path}: {line}" for line in found))
    return Params.model_validate(read_yaml(text))
