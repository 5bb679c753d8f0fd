"""Tiny mixtures of experts, for the tests."""

from typing import Any

# Widths are whole blocks of NF4: others a CPU with AVX512 computes wrongly (stages/shared/nf4.py).
TEXT = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
CHOSEN = {"num_experts_per_tok": 2}
WIDE = {"moe_intermediate_size": 64}
DEEPSEEK = {
    "head_dim": 64,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "num_key_value_heads": 4,
}
GLM = {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
MOE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4} | CHOSEN | WIDE,
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4} | CHOSEN,
    "deepseek_v3": DEEPSEEK | CHOSEN | WIDE,
    "deepseek_v2": DEEPSEEK | CHOSEN | WIDE | {"topk_method": "greedy"},
    "glm4_moe": GLM | CHOSEN | WIDE,
    "granitemoe": {"num_local_experts": 4} | CHOSEN,
    "olmoe": {"num_experts": 4} | CHOSEN,
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1} | WIDE,
    "llama4_text": {
        "num_local_experts": 4,
        "intermediate_size_mlp": 64,
        "interleave_moe_layer_step": 1,
    },
}


def moe_config(kind: str):
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **(TEXT | MOE[kind]))


def to_mxfp4(folder) -> None:
    """Turn the checkpoint of a gpt_oss in `folder` into one as it is downloaded: experts in MXFP4
    of random codes, whose values are as small as those that a model begins with."""
    import json

    import torch
    from safetensors.torch import load_file, save_file

    file, config = folder / "model.safetensors", folder / "config.json"
    tensors, draw = {}, torch.Generator().manual_seed(0)
    for name, tensor in load_file(file).items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = tensor
            continue
        experts, rows, columns = tensor.shape
        shape = experts, columns, rows // 32
        for part, low, high, size in (
            ("blocks", 0, 256, (*shape, 16)),
            ("scales", 118, 123, shape),
        ):
            tensors[f"{name}_{part}"] = torch.randint(low, high, size, generator=draw).byte()
    save_file(tensors, file, metadata={"format": "pt"})
    method = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    settings = json.loads(config.read_text()) | {"quantization_config": method}
    config.write_text(json.dumps(settings))
