"""Checks of a merged folder that need no model."""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoConfig

from stages.shared.adapter import Change
from stages.shared.adapter_record import adapter_record
from stages.shared.embeddings import untied, with_vocabulary
from stages.shared.merging import merged_shape
from stages.shared.origins import without_origins
from stages.shared.outputs import read_json
from stages.shared.process import StageError
from stages.shared.weights import LETTERS, Weights, kept_names, other_names

# Forced, since DVC would restore the wrong files from its cache.
AGAIN = "merge it again with: dvc repro --force --single-item merge"
# Otherwise train, of which the adapter is an output, would run again.
TAKEN = "dvc commit --force train && dvc repro"
# Keys that served_config of stages/merging/companions.py adds.
OF_4 = {"rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq"}
# Keys of a configuration about how, and by what, the base was stored.
STORAGE = {"quantization_config", "torch_dtype", "transformers_version"}


def check_record(folder: Path, adapter: Path, kind: str, dtype: str) -> None:
    """The merge must be of this adapter and these parameters. Raises StageError."""
    record = read_json(folder / "merge.json")
    now = {"base": kind, "dtype": dtype} | adapter_record(adapter)
    for key, value in now.items():
        if (merged := record.get(key)) != value:
            raise StageError(f"{folder} was merged with {key} {merged}, not {value}; {AGAIN}")


def check_companions(
    folder: Path, base: Path, dtype: str, vocabulary: int = 0, own_head: bool = False
) -> None:
    """Check that the files that serving reads beside the weights exist and match the base's, with
    `dtype`, at least `vocabulary` rows and, with `own_head`, an output head that is not tied.

    Raises StageError.
    """
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        if not (folder / name).exists():
            raise StageError(f"{folder} lacks {name}; {AGAIN}")
    found, expected = (
        without_origins(AutoConfig.from_pretrained(f).to_dict()) for f in (folder, base)
    )
    expected = with_vocabulary(expected, base, vocabulary)
    if own_head:
        expected = untied(expected)
    found = without_old_names(found, expected)
    _same(folder / "config.json", found, expected | {"dtype": dtype}, STORAGE)
    found = read_json(folder / "generation_config.json")
    if (base / "generation_config.json").exists():
        expected = without_origins(read_json(base / "generation_config.json"))
    else:
        expected = {key: expected.get(key) for key in found}
    # prepare may have added an end token: stages/verifying/tokenizer_check.py.
    _same(folder / "generation_config.json", found, expected, {"eos_token_id"})


def without_old_names(found: dict, expected: dict) -> dict:
    """`found` without keys that merge wrote for transformers 4: the rotary embeddings, which
    `expected` has in rope_parameters. Families that do not read them keep them unchanged."""
    made = {k: v for k, v in found.items() if k in expected or k not in OF_4}
    for key, value in expected.items():
        if key.endswith("_config") and isinstance(value, dict) and isinstance(made.get(key), dict):
            made[key] = without_old_names(made[key], value)
    return made


def _same(file: Path, found: dict, expected: dict, but: set[str]) -> None:
    for key in sorted((found.keys() | expected.keys()) - but):
        if found.get(key) != expected.get(key):
            raise StageError(
                f"{file}: {key} is {found.get(key)} and must be {expected.get(key)}; {AGAIN}"
            )


def check_headers(
    merged: Weights,
    quantized: Weights,
    base: Weights,
    dtype: torch.dtype,
    updates: Mapping[str, Change] = {},
) -> None:
    """Names, shapes, files and types against the base's. Raises StageError naming a tensor."""
    whole = other_names(quantized.folder) is not None
    kept = kept_names(quantized.folder)
    expected = {*base.names} if whole else {*quantized.names, *kept}
    for name in sorted({*expected, *merged.names}):
        if name not in merged.shapes:
            raise StageError(f"{merged.folder} lacks {name}; {AGAIN}")
        if name not in expected:
            raise StageError(f"{merged.folder} holds {name}, which the base lacks; {AGAIN}")
        where = f"{merged.files[name]}: {name}"
        shape = merged_shape(base, name, updates.get(name))
        # Other towers are copied, as is what belongs to no module or keeps its type.
        copied = name not in quantized.shapes or name in kept
        kind = base.dtypes[name] if copied else LETTERS[dtype]
        if merged.shapes[name] != shape:
            raise StageError(f"{where} is {merged.shapes[name]} and in the base {shape}; {AGAIN}")
        if merged.dtypes[name] != kind:
            raise StageError(f"{where} is {merged.dtypes[name]} and must be {kind}; {AGAIN}")
        if merged.files[name].name != base.files[name].name:
            raise StageError(f"{where}: the base has it in {base.files[name].name}; {AGAIN}")
