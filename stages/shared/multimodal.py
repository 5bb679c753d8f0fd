"""Checkpoints with towers for images or sound, of which the language model alone is trained.

Those whose language model is seen to compute, on text, what the whole does (tests/test_families.py,
transformers 5.23).
"""

MULTIMODAL = frozenset(
    {
        "gemma3",
        "gemma4",
        "idefics3",
        "internvl",
        "llava",
        "mistral3",
        "mllama",
        "qwen2_5_vl",
        "qwen2_vl",
        "qwen3_5",
        "qwen3_vl",
        "smolvlm",
    }
)
