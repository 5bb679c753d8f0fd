"""Prints untrusted text so that it cannot control the terminal or fake further lines."""

import reprlib
from collections.abc import Mapping
from typing import Any

# Longer messages are cut.
LONGEST = 2000
# What a value must be, by pydantic's error type.
_RULES = {
    "missing": "missing",
    "too_short": "is empty",
    "greater_than_equal": "must be {ge} or more",
    "greater_than": "must be more than {gt}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be {le} or less",
    "literal_error": "must be {expected}",
    "value_error": "{error}",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "string_unicode": "must be text that a file can hold",
    "string_pattern_mismatch": "must fit {pattern}",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
}


def on_screen(text: object, most: int = LONGEST) -> str:
    """`text` on one line of at most `most` characters.

    Unprintable characters (control characters, line ends, direction marks, half surrogate pairs)
    are escaped, such as \\x1b.
    """
    text = str(text)
    if len(text) > most:
        text = text[:most] + "…"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def tell(text: str) -> None:
    """Print one line that contains untrusted text, and flush."""
    print(on_screen(text), flush=True)


def brief(value: object) -> str:
    """`value` on one line of at most 60 characters; YAML aliases can make it endless."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 60
    try:
        text = short.repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


def rule(error: Mapping[str, Any]) -> str:
    """What a value must be, from one of pydantic's errors."""
    if error["type"] not in _RULES:
        return error["msg"]
    # 0.0 reads better as 0.
    context = {
        k: int(v) if isinstance(v, float) and v.is_integer() else v
        for k, v in error.get("ctx", {}).items()
    }
    return _RULES[error["type"]].format(**context)
