"""Tiny real models, tokenizers and workspaces for the tests: seconds to make, no download."""

import json
import shutil
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
PARAMS = ROOT / "tests/params.yaml"
# What all tiny models have in common.
SHAPE = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
MARKS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(folder: Path, chat_template: str | None = CHATML, pad: str = "<|im_end|>"):
    """A byte-level tokenizer (vocabulary 260: any text, one token a byte) with pad == eos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<|im_start|>", "<|im_end|>", "<pad>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token=pad,
        model_max_length=512,
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return fast


def append(file: Path, text: str) -> None:
    with file.open("a") as end:
        end.write(text)


def make_model(folder: Path, arch: str = "llama", max_shard_size: str = "5GB", **overrides):
    """A random bf16 model of `arch` (llama, mistral, qwen2, gemma): 2 layers, hidden 64."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = SHAPE | MARKS | {"tie_word_embeddings": True} | overrides
    config = AutoConfig.for_model(arch, **shape)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def make_rows(path: Path, count: int = 60) -> None:
    """JSONL with prompt, completion and group: a task that a tiny model can begin to learn."""
    rows = [
        {
            "prompt": f"Show item {i} of box {i % 7}",
            "completion": f"get --item {i} --box {i % 7}",
            "group": f"box{i % 7}",
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


TEXTS = "A road leads to a small house.\n\nThe valley is deep, and the river is cold.\n"
TINY_PARAMS = {
    "model": {"source": "local", "id": "tiny", "revision": None},
    "dataset": {"source": "local", "id": "data/source/rows.jsonl", "revision": None},
    "prepare": {"train_rows": 24, "eval_rows": 8},
    "retention": {"source": "local", "id": "data/source/texts.txt", "revision": None, "tokens": 60},
    "evaluate": {"samples": 2, "max_answer_tokens": 32},
}


def make_workspace(folder: Path, git: bool = False, **sections: dict) -> Path:
    """A copy of the project in `folder` with a tiny model, tiny rows and params to match.

    `sections` are merged over TINY_PARAMS. With `git`, a repository with one commit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (
        "stages",
        "templates",
        "tools",
        "data/source",
        ".dvc/config",
        ".dvc/.gitignore",
        ".dvc/plots",
    ):
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.jsonl"))
        else:
            shutil.copy(source, target)
    for name in ("dvc.yaml", ".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("models", "metrics"):
        (folder / name).mkdir()
    params = yaml.safe_load(PARAMS.read_text())
    for changes in (TINY_PARAMS, sections):
        for section, values in changes.items():
            if isinstance(values, dict):
                params[section] |= values
            else:
                params[section] = values
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    make_tokenizer(folder / "tiny")
    make_model(folder / "tiny")
    make_rows(folder / "data/source/rows.jsonl")
    (folder / "data/source/texts.txt").write_text(TEXTS, encoding="utf-8")
    if git:
        append(folder / ".gitignore", "/tiny/\n")
        for command in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-qm", "tiny"]):
            subprocess.run(["git", *command], cwd=folder, check=True)
    return folder
