"""Is a merged folder what merge should have written? All that its files tell without a model."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

from stages.shared.adapter import WEIGHTS
from stages.shared.outputs import read_json
from stages.shared.process import StageError, sha256
from stages.shared.weights import LETTERS, Weights

# By force: DVC has the wrong files in its cache, whole, and would take them from there.
AGAIN = "merge it again with: dvc repro --force --single-item merge"
# The adapter is an output of train, which would otherwise run again.
TAKEN = "dvc commit --force train && dvc repro"


def check_record(folder: Path, adapter: Path, kind: str, dtype: str) -> None:
    """The merge must be of this adapter and these parameters. Raises StageError."""
    record = read_json(folder / "merge.json")
    now = {"base": kind, "dtype": dtype, "adapter_sha256": sha256(adapter / WEIGHTS)}
    for key, value in now.items():
        if record[key] != value:
            raise StageError(f"{folder} was merged with {key} {record[key]}, not {value}; {AGAIN}")


def check_companions(folder: Path, base: Path, dtype: str) -> None:
    """What serving reads beside the weights is there, and config.json is the base's in `dtype`.

    Raises StageError.
    """
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        if not (folder / name).exists():
            raise StageError(f"{folder} lacks {name}; {AGAIN}")
    found, expected = (read_json(f / "config.json") for f in (folder, base))
    for key in ("quantization_config", "torch_dtype"):
        expected.pop(key, None)
    expected["dtype"] = dtype
    for key in sorted(found.keys() | expected.keys()):
        if found.get(key) != expected.get(key):
            raise StageError(
                f"{folder / 'config.json'}: {key} is {found.get(key)} and must be "
                f"{expected.get(key)}; {AGAIN}"
            )


def check_headers(merged: Weights, quantized: Weights, base: Weights, dtype: torch.dtype) -> None:
    """Names, shapes, files and types against the base's. Raises StageError naming a tensor."""
    for name in sorted({*quantized.names, *merged.names}):
        if name not in merged.shapes:
            raise StageError(f"{merged.folder} lacks {name}; {AGAIN}")
        if name not in quantized.shapes:
            raise StageError(f"{merged.folder} holds {name}, which the base lacks; {AGAIN}")
        where, shape, kind = f"{merged.files[name]}: {name}", base.shapes[name], LETTERS[dtype]
        if merged.shapes[name] != shape:
            raise StageError(f"{where} is {merged.shapes[name]} and in the base {shape}; {AGAIN}")
        if merged.dtypes[name] != kind:
            raise StageError(f"{where} is {merged.dtypes[name]} and must be {kind}; {AGAIN}")
        if merged.files[name].name != base.files[name].name:
            raise StageError(f"{where}: the base has it in {base.files[name].name}; {AGAIN}")


def check_tokenizer(folder: Path, prepared: Path, adapter: Path) -> None:
    """The merged model's tokenizer must give the held-out rows' ids. Raises StageError.

    `prepared` is the rows' tokenizer; that of `adapter` went into the merge. It may know further
    tokens, as long as each has a row in the embeddings.
    """
    rows = AutoConfig.from_pretrained(folder).get_text_config().vocab_size
    found, expected = (AutoTokenizer.from_pretrained(f).get_vocab() for f in (folder, prepared))
    wrong = [token for token, id in expected.items() if found.get(token) != id]
    wrong += [token for token in found.keys() - expected.keys() if found[token] >= rows]
    if wrong:
        token = min(wrong)
        raise StageError(
            f"{folder}: its tokenizer has {token!r} as {found.get(token)} and that of the held-out "
            f"rows as {expected.get(token)} ({len(wrong)} tokens differ; the embeddings have "
            f"{rows} rows); delete the tokenizer's files from {adapter}, then: {TAKEN}"
        )
