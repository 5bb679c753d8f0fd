"""Families of models, each as a tiny checkpoint, through the stages that a family can trouble.

    python -m tests.families                  # all of them; an hour
    python -m tests.families gemma3 granite   # these

Each runs in two settings: NF4 merged onto what it was trained on, and 16 bit merged onto the
original with packed rows where plan allows them. After each, what the stages say is held against
transformers alone. Writes the table of docs/models.md; families that were not asked for keep their
line.
"""

import json
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import quick
import yaml
from moe import to_mxfp4
from tiny import MARKS, SHAPE, make_tokenizer, make_workspace

DOCS = Path(__file__).parent.parent / "docs/models.md"
BEGIN, END = "<!-- families: python -m tests.families -->", "<!-- /families -->"
# Settings of all families.
TEXT = SHAPE | MARKS | {"vocab_size": 264}
IMAGE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
QWEN = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "out_hidden_size": 64,
    "patch_size": 14,
}
LOCAL = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 1}
STATE = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}


LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
GROUPS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
GPT_OSS = LOCAL | {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
# The first layer is dense.
SHARED = {"first_k_dense_replace": 1, "moe_intermediate_size": 64}


def positions(*sections: int, **more: Any) -> dict:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    return {"rope_parameters": rope | more}


@dataclass(frozen=True)
class Family:
    """`says` is what a stage refuses it with, `mxfp4` that its experts come so. `text` and `towers`
    make one with several towers."""

    kind: str
    settings: dict = field(default_factory=dict)
    text: dict | None = None
    says: str | None = None
    lora: dict = field(default_factory=dict)
    without: frozenset = frozenset()
    mxfp4: bool = False


WIDTH = frozenset({"head_dim"})

# They need no settings.
# fmt: off
USUAL = (
    "apertus", "arcee", "cwm", "ernie4_5", "exaone4", "gemma", "gemma2", "glm", "glm4", "helium",
    "hunyuan_v1_dense", "jais2", "llama", "ministral", "ministral3", "mistral", "nanochat",
    "nemotron", "olmo", "olmo2", "olmo3", "persimmon", "phi", "phi3", "qwen2", "qwen3",
    "seed_oss", "smollm3", "stablelm", "starcoder2", "vaultgemma",
)
# fmt: on
FAMILIES: dict[str, Family] = {name: Family(name) for name in USUAL}
FAMILIES |= {
    "bitnet": Family("bitnet"),
    "bloom": Family("bloom", {"n_head": 4, "n_layer": 2}),
    "codegen": Family("codegen", {"n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8}),
    "cohere": Family("cohere", {"logit_scale": 0.25}),
    "cohere2": Family("cohere2", {"logit_scale": 0.25, **LOCAL}),
    "diffllama": Family("diffllama"),
    "falcon": Family(
        "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, without=WIDTH
    ),
    "falcon (7B)": Family("falcon", {"multi_query": True}, without=WIDTH),
    "falcon_h1": Family("falcon_h1", {"lm_head_multiplier": 0.25, **MAMBA}),
    "gemma3_text": Family("gemma3_text", LOCAL),
    "gemma3n_text": Family(
        "gemma3n_text",
        {
            "intermediate_size": [128, 128],
            "layer_types": ["sliding_attention", "full_attention"],
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": 264,
            "hidden_size_per_layer_input": 16,
            "activation_sparsity_pattern": [0.0, 0.0],
        },
    ),
    "gemma4_text": Family(
        "gemma4_text",
        LOCAL | {"global_head_dim": 32, "vocab_size_per_layer_input": 264},
    ),
    "gpt2": Family("gpt2", {"n_embd": 64, "n_head": 4, "n_layer": 2}, says="Conv1D"),
    "gpt_bigcode": Family("gpt_bigcode", {"n_embd": 64, "n_head": 4, "n_layer": 2}),
    "gpt_neo": Family(
        "gpt_neo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "gpt_neox": Family("gpt_neox"),
    "gptj": Family("gptj", {"n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8}),
    "doge": Family("doge"),
    "granite_swa": Family("granite_swa", {"logits_scaling": 8.0}),
    "granite": Family("granite", {"logits_scaling": 8.0, "embedding_multiplier": 12.0}),
    "granitemoehybrid (dense)": Family(
        "granitemoehybrid",
        {
            "logits_scaling": 8.0,
            "layer_types": ["attention"] * 2,
            "num_local_experts": 0,
            "shared_intermediate_size": 128,
        },
    ),
    "hyperclovax": Family("hyperclovax", {"logits_scaling": 4.0}),
    "lfm2": Family("lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16}),
    "minicpm3": Family(
        "minicpm3",
        {
            "dim_model_base": 16,
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
        },
    ),
    "mpt": Family("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2}),
    "opt": Family("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "qwen3_5_text": Family("qwen3_5_text", LINEAR),
    "recurrent_gemma": Family(
        "recurrent_gemma",
        {"logits_soft_cap": 0.5, "lru_width": 64, "num_key_value_heads": 1, "num_hidden_layers": 3},
    ),
    "xglm": Family("xglm", {"d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4}),
    # A state beside attention.
    "bamba": Family(
        "bamba",
        {"attn_layer_indices": [1], "mamba_n_groups": 1, **STATE},
    ),
    "granitemoehybrid (dense, Mamba)": Family(
        "granitemoehybrid",
        {
            "logits_scaling": 8.0,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 0,
            "shared_intermediate_size": 128,
            **STATE,
        },
    ),
    "jamba (dense)": Family(
        "jamba",
        {
            "num_experts": 1,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "nemotron_h": Family(
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "attention", "mlp"],
            "num_hidden_layers": 3,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
            "chunk_size": 16,
        },
    ),
    "olmo_hybrid": Family("olmo_hybrid", LINEAR),
    "zamba2": Family(
        "zamba2",
        {
            "layers_block_type": ["mamba", "hybrid"],
            "mamba_d_state": 16,
            "mamba_ngroups": 1,
            "n_mamba_heads": 8,
            "num_mem_blocks": 1,
            "use_mamba_kernels": False,
            "adapter_rank": 8,
        },
    ),
    # Several towers.
    "gemma3": Family("gemma3", {"vision_config": IMAGE, "mm_tokens_per_image": 4}, LOCAL),
    "gemma4": Family(
        "gemma4",
        {"vision_config": IMAGE | {"num_key_value_heads": 4, "head_dim": 16}, "audio_config": None},
        LOCAL
        | {
            "global_head_dim": 32,
            "vocab_size_per_layer_input": 264,
            "hidden_size_per_layer_input": 16,
        },
    ),
    "idefics3": Family(
        "idefics3", {"vision_config": IMAGE, "scale_factor": 2}, {"model_type": "llama"}
    ),
    "internvl": Family(
        "internvl",
        {"vision_config": IMAGE | {"image_size": [28, 28], "patch_size": [14, 14]}},
        {"model_type": "qwen2"},
    ),
    "llava": Family(
        "llava",
        {"vision_config": IMAGE | {"model_type": "clip_vision_model", "projection_dim": 64}},
        {"model_type": "llama"},
    ),
    "mistral3": Family(
        "mistral3",
        {"vision_config": IMAGE | {"model_type": "pixtral", "head_dim": 16}},
        {"model_type": "mistral"},
    ),
    "mistral3 (Ministral 3)": Family(
        "mistral3",
        {"vision_config": IMAGE | {"model_type": "pixtral", "head_dim": 16}},
        {"model_type": "ministral3"},
    ),
    "mllama": Family(
        "mllama",
        {
            "vision_config": IMAGE
            | {
                "num_global_layers": 1,
                "attention_heads": 4,
                "vision_output_dim": 128,
                "intermediate_layers_indices": [0],
                "supported_aspect_ratios": [[1, 1]],
                "max_num_tiles": 1,
            }
        },
        {
            "num_hidden_layers": 3,
            "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "llama4_text (dense)": Family(
        "llama4_text",
        {
            "intermediate_size_mlp": 128,
            "num_local_experts": 2,
            "moe_layers": [],
            "interleave_moe_layer_step": 0,
            "no_rope_layers": [1, 1],
            "attn_temperature_tuning": False,
        },
    ),
    # Experts.
    "deepseek_v2": Family("deepseek_v2", LATENT | GROUPS | SHARED | {"topk_method": "greedy"}),
    "deepseek_v3": Family("deepseek_v3", LATENT | GROUPS | SHARED),
    "ernie4_5_moe": Family(
        "ernie4_5_moe",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 64,
            "moe_layer_start_index": 1,
        },
    ),
    "glm4_moe": Family("glm4_moe", GROUPS | SHARED),
    "gpt_oss": Family("gpt_oss", GPT_OSS),
    "gpt_oss (MXFP4)": Family("gpt_oss", GPT_OSS, mxfp4=True),
    "granitemoe": Family("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4_text": Family(
        "llama4_text",
        {
            "intermediate_size_mlp": 128,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 1],
            "attn_temperature_tuning": False,
        },
    ),
    "mixtral": Family("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": Family("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": Family(
        "qwen2_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
        },
    ),
    "qwen3_moe": Family(
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
    "qwen2_vl": Family(
        "qwen2_vl",
        {"vision_config": {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4}},
        positions(2, 3, 3),
    ),
    "qwen2_5_vl": Family(
        "qwen2_5_vl", {"vision_config": QWEN | {"fullatt_block_indexes": [1]}}, positions(2, 3, 3)
    ),
    "qwen3_vl": Family(
        "qwen3_vl",
        {"vision_config": QWEN | {"deepstack_visual_indexes": [0, 1]}},
        positions(4, 2, 2, mrope_interleaved=True),
    ),
    "qwen3_5": Family("qwen3_5", {"vision_config": QWEN}, LINEAR),
    "smolvlm": Family(
        "smolvlm", {"vision_config": IMAGE, "scale_factor": 2}, {"model_type": "llama"}
    ),
}
FAMILIES["dbrx"] = Family(
    "dbrx",
    {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    },
    says="code of its own",
)
# For every test run: family and setting.
HANDFUL = {"gemma3": "NF4", "granite": "16 bit", "qwen3_moe": "NF4", "deepseek_v3": "NF4"}


def config_of(family: Family):
    from transformers import AutoConfig

    if family.text is None:
        common = {key: value for key, value in TEXT.items() if key not in family.without}
        settings = common | {"tie_word_embeddings": True} | family.settings
        return AutoConfig.for_model(family.kind, **settings)
    tied = {"tie_word_embeddings": False}
    towers = {"text_config": TEXT | family.text}
    return AutoConfig.for_model(family.kind, **towers, **tied, **family.settings)


def model_of(family: Family, dtype=None):
    """A random model of all its towers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto: Any = AutoModelForImageTextToText if family.text is not None else AutoModelForCausalLM
    torch.manual_seed(0)
    return auto.from_config(config_of(family), dtype=dtype or torch.bfloat16).eval()


def make_checkpoint(folder: Path, family: Family) -> None:
    """Like on the Hub: with the files' own names, and a processor's files."""
    shutil.rmtree(folder, ignore_errors=True)
    make_tokenizer(folder)
    model_of(family).save_pretrained(folder)
    if family.mxfp4:
        to_mxfp4(folder)
    if family.text is not None:
        for name in ("processor_config.json", "preprocessor_config.json"):
            (folder / name).write_text(json.dumps({"image_processor_type": "Tiny"}))


SETTINGS = {
    "NF4": {"quantize": {"type": "nf4"}, "merge": {"base": "dequantized", "dtype": "float16"}},
    "16 bit": {"quantize": {"type": "none"}, "merge": {"base": "original", "dtype": "bfloat16"}},
}
STAGES = ("fetch_model", "plan", "quantize", "train", "evaluate", "merge", "verify")
"""Those that a family can trouble; prepare and what fetches data ran before."""


def prepared(folder: Path) -> Path:
    """A workspace with prepared rows, for all families."""
    make_workspace(folder)
    for stage in ("fetch_model", "fetch_data", "fetch_retention", "prepare"):
        quick.run(stage, folder)
    return folder


def set_params(folder: Path, family: Family, settings: dict, packing: bool) -> None:
    path = folder / "params.yaml"
    params = yaml.safe_load(path.read_text())
    for section, values in settings.items():
        params[section] |= values
    params["train"] |= {"batching": "packing" if packing else "group_by_length", "batch_size": 2}
    params["train"] |= {"learning_rate": 1e-2, "gradient_accumulation": 4}
    params["lora"] |= {"target_modules": "all-linear"} | family.lora
    path.write_text(yaml.safe_dump(params, sort_keys=False))


def run_stages(folder: Path) -> str | None:
    """The message of the first stage that fails; None if all succeed."""
    for stage in STAGES:
        if quick.Stage(stage, folder).wait():
            lines = (folder / f"{stage}.log").read_text().strip().splitlines()
            if any(line.startswith("Traceback") for line in lines):
                print("\n".join(lines[-25:]))
            return f"{stage}: {lines[-1].removeprefix(f'{stage}: ')}" if lines else stage
    return None


def check_results(folder: Path, family: Family) -> None:
    """Hold what evaluate says to transformers alone: the merge, loaded as whoever serves it does,
    one row at a time."""
    import math

    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from stages.shared.rows import read_rows

    auto: Any = AutoModelForImageTextToText if family.text is not None else AutoModelForCausalLM
    model, report = auto.from_pretrained(
        folder / "models/merged", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"], report["missing_keys"]
    assert not report["unexpected_keys"], report["unexpected_keys"]
    if family.text is not None:
        check_towers(folder, model)
    total, count = 0.0, 0
    for row in read_rows(folder / "data/prepared/eval.arrow"):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            chances = model.eval()(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        for i, label in enumerate(row["labels"][1:]):
            if label != -100:
                total, count = total - chances[i, label].item(), count + 1
    said = json.loads((folder / "metrics/verify.json").read_text())["merged_perplexity"]
    assert abs(math.exp(total / count) / said - 1) < 2e-3, (math.exp(total / count), said)


def check_towers(folder: Path, model) -> None:
    """All tensors but the language model's are bit-identical to the base's."""
    import torch
    from safetensors.torch import load_file

    base, merged = (
        load_file(folder / "models" / name / "model.safetensors") for name in ("base", "merged")
    )
    names = json.loads((folder / "models/quantized/names.json").read_text())
    towers = base.keys() - set(names.values())
    assert merged.keys() == base.keys()
    assert towers
    assert all(merged[key].dtype == base[key].dtype for key in towers)
    assert all(torch.equal(merged[key], base[key]) for key in towers)
    kept = {file.name for file in (folder / "models/merged").glob("*processor_config.json")}
    assert kept == {"processor_config.json", "preprocessor_config.json"}, kept


def works(folder: Path, family: Family, setting: str, packing: bool) -> str | None:
    """What is wrong with a family in one of SETTINGS, or None."""
    set_params(folder, family, SETTINGS[setting], packing)
    if said := run_stages(folder):
        return said
    try:
        check_results(folder, family)
    except AssertionError as error:
        return f"verify says otherwise than transformers: {error}"
    return None


def try_family(name: str, folder: Path) -> dict[str, str]:
    """Its line of the table."""
    from stages.shared.fast_path import FLATTENED, MASKED
    from stages.shared.text_model import language_config

    family = FAMILIES[name]
    make_checkpoint(folder / "tiny", family)
    kind = language_config(config_of(family)).model_type
    packing = kind in FLATTENED | MASKED
    faults = {"NF4": works(folder, family, "NF4", packing=False)}
    if not faults["NF4"]:
        faults["16 bit"] = works(folder, family, "16 bit", packing)
    told = [f"{setting}: {fault}" for setting, fault in faults.items() if fault]
    if family.says:
        expected = any(family.says in fault for fault in told)
        result = "refused" if expected else "NOT REFUSED"
    else:
        result = "FAILS" if told else "works" if packing else "works, unpacked"
    trained = f"{kind}" if family.text is not None else ""
    why = re.sub(r"\s+", " ", told[0].replace("|", "/"))[:160] if told else ""
    return {"result": result, "packing": "yes" if packing else "no", "as": trained, "why": why}


def read_table() -> dict[str, str]:
    """The lines of the table that are there, by family."""
    text = DOCS.read_text(encoding="utf-8")
    lines = text.split(BEGIN)[1].split(END)[0].splitlines()
    return {line.split("`")[1]: line for line in lines if line.startswith("| `")}


def write_table(found: dict[str, dict[str, str]]) -> None:
    lines = {name: line for name, line in read_table().items() if name in FAMILIES}
    for name, row in found.items():
        cells = [f"`{name}`", row["result"], row["packing"], row["as"], row["why"]]
        cells.append(version("transformers"))
        lines[name] = "| " + " | ".join(cells) + " |"
    head = "| `model_type` | result | packing | trained as | why | transformers |"
    table = "\n".join([head, "|---" * 6 + "|", *(lines[name] for name in sorted(lines))])
    before, rest = DOCS.read_text(encoding="utf-8").split(BEGIN)
    DOCS.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> None:
    names = sys.argv[1:] or list(FAMILIES)
    if unknown := set(names) - FAMILIES.keys():
        sys.exit(f"no such families: {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}")
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = prepared(Path(scratch) / "ws")
        for name in names:
            row = try_family(name, folder)
            print(f"{name}: {row['result']} {row['why']}", flush=True)
            write_table({name: row})
            failed += [name] if row["result"].isupper() else []
    sys.exit(f"{len(failed)} families are not as they should be: {failed}" if failed else 0)


if __name__ == "__main__":
    main()
