"""What tests of merge and verify share: sources made by transformers and PEFT themselves."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from stages.shared.outputs import write_sums
from stages.shared.rows import SCHEMA
from tests.tiny import PARAMS, make_model, make_tokenizer

NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


def make_sources(root: Path, arch: str = "llama", nf4: bool = True, lora=None, **base) -> Path:
    """models/base, models/quantized and models/adapter of a tiny model under `root`."""
    models = root / "models"
    make_model(models / "base", arch, **base)
    (models / "base" / "LICENSE").write_text("Free for all.\n")
    source = {"source": "local", "id": "tiny", "commit": None, "files": {}}
    (models / "base" / "source.json").write_text(json.dumps(source))
    write_sums(models / "base")
    if nf4:
        model = AutoModelForCausalLM.from_pretrained(
            models / "base", quantization_config=NF4, dtype=torch.bfloat16, device_map="cpu"
        )
        model.save_pretrained(models / "quantized")
    else:
        shutil.copytree(models / "base", models / "quantized")
    write_sums(models / "quantized")
    make_adapter(models / "base", models / "adapter", **(lora or {}))
    return root


def make_adapter(base: Path, folder: Path, seed: int = 1, scale: float = 0.05, **config) -> None:
    """A LoRA adapter with random factors, as PEFT saves it, with a tokenizer."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | config
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(task_type="CAUSAL_LM", **settings),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "trainable_tokens_delta" in name:
            torch.nn.init.normal_(parameter, std=scale)
    model.save_pretrained(folder)
    edit_json(folder / "adapter_config.json", base_model_name_or_path="tiny")
    make_tokenizer(folder)
    write_sums(folder)


def in_memory(
    models: Path, kind: str, dtype: torch.dtype, adapter: str = "adapter"
) -> dict[str, torch.Tensor]:
    """The tensors that PEFT's own merge in memory gives, on the device that merge takes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = models / ("base" if kind == "original" else "quantized")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": device})
    if "quantization_config" in json.loads((folder / "config.json").read_text()):
        model = model.dequantize(dtype=dtype)
    merged = PeftModel.from_pretrained(model.to(dtype), models / adapter).merge_and_unload(
        safe_merge=False
    )
    return {name: tensor.cpu() for name, tensor in merged.state_dict().items()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder of safetensors files."""
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


def edit_tensors(file: Path, change) -> None:
    """Rewrite a safetensors file after `change(tensors)`."""
    content = load_file(file)
    change(content)
    save_file(content, file, metadata={"format": "pt"})


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def make_prepared(root: Path, rows: int = 12) -> None:
    """data/prepared/eval.arrow with rows of random text of several lengths."""
    torch.manual_seed(2)
    content = []
    for i in range(rows):
        ids = torch.randint(4, 260, (6 + 3 * i,)).tolist()
        labels = [-100] * 4 + ids[4:]
        content.append({"row": f"rows.jsonl:{i}", "input_ids": ids, "labels": labels})
        content[-1] |= {"prompt_tokens": 4, "scored_bytes": len(ids) - 4}
    make_tokenizer(root / "data/prepared/tokenizer")
    path = str(root / "data/prepared/eval.arrow")
    with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, SCHEMA) as stream:
        stream.write_table(pa.Table.from_pylist(content, SCHEMA))
    write_sums(root / "data/prepared")


def run(stage, root: Path, monkeypatch, **sections) -> None:
    """main() of a stage in `root`, with these values over tests/params.yaml."""
    params = yaml.safe_load(PARAMS.read_text())
    for section, values in sections.items():
        params[section] |= values
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(root)
    stage.main()
