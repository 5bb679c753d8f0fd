"""Where files of a base were once loaded from: for a local one, paths of the machine."""

from typing import Any

# Keys of a configuration, and of a tokenizer's; transformers reads none of them.
ORIGINS = ("_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file")


def without_origins(content: Any) -> Any:
    """`content`, as read from JSON, without these keys at any depth."""
    if isinstance(content, dict):
        return {k: without_origins(v) for k, v in content.items() if k not in ORIGINS}
    if isinstance(content, list):
        return [without_origins(value) for value in content]
    return content
