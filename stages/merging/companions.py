"""Files for serving beside the weights: the base's own, with the final tokenizer settings.

They also work with transformers 4, which is still common: it has other names for some keys of
transformers 5, and silently uses defaults for keys that it does not find.
"""

import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.hub import CHAT_TEMPLATE_DIR, CHAT_TEMPLATE_FILE
from transformers.utils.hub import LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE as PROCESSOR_TEMPLATE

from stages.shared.embeddings import untied, with_vocabulary
from stages.shared.end_tokens import end_tokens
from stages.shared.loading import check_tokenizer
from stages.shared.origins import without_origins
from stages.shared.outputs import check_sums, read_json, write_json

TOKENIZER_FILES = (
    "tokenizer*.json",
    "*.model",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "tekken.json",
    "chat_template*",
    f"{CHAT_TEMPLATE_DIR}/*.jinja",
)
# A tokenizer without them is not a fast one.
NEEDED = ("tokenizer.json", "tokenizer_config.json")
PROCESSORS = ("*processor_config.json",)
LICENCES = ("licen[cs]e*", "notice*", "copying*", "use_policy*")
# Rotary embeddings that transformers 4 reads from `rope_scaling`; 5 reads no others from there.
ROPES_OF_4 = ("linear", "dynamic", "yarn", "longrope", "llama3")
# Keys of a tokenizer that prepare may change, beside its template.
SETTLED = ("eos_token", "pad_token")


def write_companions(
    out: Path,
    base: Path,
    tokenizer: Path,
    dtype: torch.dtype,
    vocabulary: int = 0,
    own_head: bool = False,
) -> None:
    """Write configs, tokenizer, chat templates, processor files and licence into `out`.

    vocabulary  rows that the embeddings have at the least
    own_head    whether the output head differs from the embeddings, though the base ties them
    """
    config = served_config(read_json(base / "config.json"))
    if own_head:
        config = untied(config)
    config = with_vocabulary(config, base, vocabulary)
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_json(out / "config.json", config, sort_keys=True)
    write_tokenizer(out, base, tokenizer)
    copy(base, out, (*PROCESSORS, *LICENCES))
    if (base / "generation_config.json").exists():
        generation = without_origins(read_json(base / "generation_config.json"))
    else:
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = {key: config[key] for key in ids if config.get(key) is not None}
    if ends := end_tokens(tokenizer, generation.get("eos_token_id")):
        generation["eos_token_id"] = ends
    write_json(out / "generation_config.json", generation, sort_keys=True)


def tokenizer_folder(adapter: Path, prepared: Path) -> Path:
    """The folder of the tokenizer for the merged model; a foreign adapter may have none."""
    if all((adapter / name).exists() for name in NEEDED):
        check_tokenizer(adapter, str(adapter), f"delete the tokenizer's files from {adapter}")
        return adapter
    print(f"merge: {adapter} has no tokenizer; using that of the rows")
    check_sums(prepared, "prepare")
    return prepared / "tokenizer"


def served_config(config: dict) -> dict:
    """config.json without the base's storage settings and paths, with rotary embeddings also in
    version 4's keys.

    transformers 4 ignores `rope_parameters` and would use 10,000 for rope_theta.
    """
    made = without_origins(config)
    made = {k: v for k, v in made.items() if k not in ("quantization_config", "torch_dtype")}
    if "text_config" in made:
        made["text_config"] = served_config(made["text_config"])
    rope = made.get("rope_parameters") or {}
    old = {}
    if local := rope.get("sliding_attention"):
        rope = rope.get("full_attention") or {}
        old["rope_local_base_freq"] = local["rope_theta"]
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            old[key] = rope[key]
    if rope.get("rope_type") in ROPES_OF_4:
        old["rope_scaling"] = {k: v for k, v in rope.items() if k not in old}
    return old | made


def write_tokenizer(out: Path, base: Path, settled: Path) -> None:
    """Write the tokenizer of `settled` into `out`, using the base's own files if possible.

    Those may contain more than transformers 5 saves: other programs convert tokenizer.model.
    """
    chosen = AutoTokenizer.from_pretrained(settled)
    for sources in ((base,), (base, settled), (settled,)):
        files = [file for source in sources for file in copy(source, out, TOKENIZER_FILES)]
        if all((out / name).exists() for name in NEEDED):
            settle(out, chosen)
            if sources == (settled,) or behaviour(out) == behaviour(settled):
                return
        for file in set(files):
            file.unlink(missing_ok=True)


def behaviour(folder: Path) -> tuple:
    """Everything that decides how the tokenizer in `folder` encodes and decodes."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Left over from its author's last call.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    named = {key: str(token) for key, token in tokenizer.special_tokens_map.items()}
    template = default_template(tokenizer)
    return tokenizer.backend_tokenizer.to_str(), named, set(tokenizer.all_special_ids), template


def settle(folder: Path, chosen: PreTrainedTokenizerBase) -> None:
    """Put the special tokens and the template of `chosen` into the files of `folder`."""
    put_template(folder, default_template(chosen))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            content = read_json(folder / name)
            settled = old_form(content)
            for key in SETTLED:
                if token_text(settled.get(key)) != getattr(chosen, key):
                    settled[key] = getattr(chosen, key)
            if settled != content:
                write_json(folder / name, settled, ensure_ascii=False)


def old_form(config: dict) -> dict:
    """tokenizer_config.json in the form of transformers 4, which 5 still reads."""
    # How and from where it was loaded does not belong there.
    made = without_origins(config)
    made = {k: v for k, v in made.items() if k not in ("is_local", "local_files_only")}
    if made.get("tokenizer_class") == "TokenizersBackend":
        made["tokenizer_class"] = "PreTrainedTokenizerFast"
        made.pop("backend", None)
    if isinstance(made.get("extra_special_tokens"), list):
        made["additional_special_tokens"] = made.pop("extra_special_tokens")
    return made


def put_template(folder: Path, template: str | None) -> None:
    """Write the default template where the base has it; named templates stay."""
    if template is None:
        return
    config = read_json(folder / "tokenizer_config.json")
    inline = config.get("chat_template")
    if isinstance(inline, list):
        others = [entry for entry in inline if entry["name"] != "default"]
        config["chat_template"] = [{"name": "default", "template": template}, *others]
    elif inline is not None:
        config["chat_template"] = template
    if config.get("chat_template") != inline:
        write_json(folder / "tokenizer_config.json", config, ensure_ascii=False)
    if inline is None or (folder / CHAT_TEMPLATE_FILE).exists():
        (folder / CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8", newline="")
    # Where processors keep theirs.
    if (folder / PROCESSOR_TEMPLATE).exists():
        write_json(folder / PROCESSOR_TEMPLATE, {"chat_template": template}, ensure_ascii=False)


def default_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The default chat template."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def token_text(token: dict | str | None) -> str | None:
    """A special token as in files: its text, optionally with matching options."""
    return token["content"] if isinstance(token, dict) else token


def copy(source: Path, out: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Copy the files of `source` whose names match, ignoring case; returns their new paths."""
    made = []
    for file in sorted(source.rglob("*")):
        name = file.relative_to(source).as_posix()
        depth = name.count("/")
        wanted = any(
            Path(name.lower()).match(pattern) for pattern in patterns if pattern.count("/") == depth
        )
        if wanted and file.is_file():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, out / name)
            made.append(out / name)
    return made
