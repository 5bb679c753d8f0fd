"""Families with image or audio towers, of which only the language model is trained.

On text, the language model alone computes the same as the whole model (tests/test_families.py,
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
