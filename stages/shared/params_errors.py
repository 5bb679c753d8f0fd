"""Errors in params.yaml in words: one line each, with the key that was probably meant."""

import difflib
import re
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from stages.shared.screen import brief, on_screen, rule

# Keys of other tools in `lora` (part of the key) -> message.
_OF_LORA = {
    "rslora": "unknown key; write scaling: rslora",
    "dora": "DoRA is not supported: it rescales whole columns of the weight, so what it adds is "
    "not of low rank, and a 4-bit base is dequantized at every step to measure them",
    "pissa|olora|init": "starts that change the base's own weights (PiSSA, OLoRA and others) are "
    "not supported: PEFT refuses a 4-bit base, or quantizes it a second time",
}
# Messages for this file in place of the general ones.
_RULES = {
    "model_type": "must be a section with keys",
    "dict_type": "must be a mapping of column names",
    "list_type": "must be a list",
}


def known_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key of a schema in dotted form, such as `lora.r`."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        for inside in _sections_of(field.annotation):
            keys += known_keys(inside, f"{prefix}{name}.")
    return keys


def _sections_of(kind: Any) -> list[type[BaseModel]]:
    """The sections in a type, including optional ones and those in lists."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [section for each in get_args(kind) for section in _sections_of(each)]


def near(word: str, words: dict[str, str], likeness: float) -> str:
    """The entry of `words` whose key is most similar to `word`, as a question."""
    close = difflib.get_close_matches(word, words, 1, likeness)
    return f"; did you mean {words[close[0]]}?" if close else ""


def _near_key(key: str, keys: list[str]) -> str:
    """The most similar key: of the same section, or with that name in another one."""
    section, _, name = key.rpartition(".")
    split = [(k, *k.rpartition(".")[::2]) for k in keys]
    siblings = {last: full for full, parent, last in split if parent == section}
    elsewhere = {last: full for full, parent, last in split if parent}
    return near(name, siblings, 0.6) or near(name, elsewhere, 0.8)


def _siblings(section: str, keys: list[str]) -> str:
    """The keys of `section`, "" for the sections themselves."""
    split = [key.rpartition(".") for key in keys]
    names = [name for parent, _, name in split if parent == section]
    return f"; {section or 'the file'} has {', '.join(names)}"


def _without_numbers(place: tuple[int | str, ...]) -> str:
    """A place in the file in the form of `known_keys`: without list indices."""
    return ".".join(part for part in place if isinstance(part, str))


def messages(error: ErrorDetails, schema: type[BaseModel]) -> list[str]:
    """One pydantic error as lines `key: what is wrong (got value)`."""
    keys = known_keys(schema)
    kind, got, context = error["type"], error["input"], error.get("ctx", {})
    parts = [str(part) for part in error["loc"] if part != "[key]"]
    key = ".".join(on_screen(part, 60) for part in parts)
    if kind in ("extra_forbidden", "invalid_key"):
        if "." in parts[-1] and parts[-1] in keys:
            whose, _, below = parts[-1].partition(".")
            return [f"{key}: unknown key; write {below} below {whose}"]
        section = _without_numbers(error["loc"][: len(parts) - 1])
        for asked, said in _OF_LORA.items() if section == "lora" else ():
            if re.search(asked, parts[-1].casefold()):
                return [f"{key}: {said}"]
        meant = _near_key(f"{section}.{parts[-1]}" if section else parts[-1], keys)
        return [f"{key}: unknown key{meant or _siblings(section, keys)}"]
    sections = {"", *(name.rpartition(".")[0] for name in keys)}
    if kind == "value_error" and _without_numbers(error["loc"]) in sections:
        prefix = f"{key}." if key else ""
        return [f"{prefix}{line}" for line in str(context["error"]).split("\n")]
    said = f"{key}: {_RULES.get(kind) or rule(error)}"
    if kind == "missing":
        return [said]
    meant = ""
    if kind == "literal_error" and isinstance(got, str):
        options = re.findall(r"'([^']+)'", context["expected"])
        meant = near(got, dict(zip(options, options, strict=True)), 0.6)
    return [f"{said} (got {brief(got)}){meant}"]
