"""Tokens that a model lacks: lora.new_tokens adds them; a template that needs others is refused."""

import re
from collections.abc import Iterator
from typing import Any

from tokenizers import AddedToken

from stages.preparing.formats import Example, chat_of
from stages.preparing.messages import Unusable
from stages.preparing.rendering import Rendered
from stages.shared.params import Prepare
from stages.shared.process import StageError
from stages.shared.screen import tell

# Only markers have this form; [INST], ### or a word may be plain text.
MARK = re.compile(r"<[|\uff5c][^\s<>|\uff5c]{1,60}[|\uff5c]>")


def add_tokens(tokenizer, tokens: list[str]) -> dict[str, dict[str, int]]:
    """Add those of `tokens` that `tokenizer` lacks, as special tokens.

    Returns the ids of added and of known tokens, for prepared.json; empty without `tokens`.
    """
    before = tokenizer.get_vocab()
    added = [token for token in tokens if token not in before]
    if added:
        marks = [AddedToken(token, special=True, normalized=False) for token in added]
        # Listed by name too, since other programs hide the tokens that are listed.
        tokenizer.add_special_tokens(
            {"extra_special_tokens": marks}, replace_extra_special_tokens=False
        )
        tell(f"prepare: added to the tokenizer: {', '.join(added)}")
    if known := {token: before[token] for token in tokens if token in before}:
        tell(f"prepare: tokens of the model itself, whose rows are trained too: {', '.join(known)}")
    new = {token: tokenizer.convert_tokens_to_ids(token) for token in added}
    return {key: ids for key, ids in (("new_tokens", new), ("known_tokens", known)) if ids}


def check_marks(
    tokenizer, params: Prepare, samples: list[Example], made: list[Rendered | Unusable]
) -> str:
    """Raise StageError if the template writes markers that are not tokens, which would be learned
    letter by letter. For the model's own template, which may intend this, returns a message.

    made: the rendered samples
    """
    known, missing = tokenizer.get_vocab(), dict[str, None]()
    for sample, row in zip(samples, made, strict=True):
        chat = chat_of(sample)
        if chat and isinstance(row, Rendered):
            words = list(_texts([chat.messages, chat.given]))
            missing |= dict.fromkeys(
                mark
                for mark in MARK.findall(row.prompt + row.answer)
                if mark not in known and not any(mark in text for text in words)
            )
    if missing and params.template == "chat":
        return f"; not tokens of this model, so learned letter by letter: {', '.join(missing)}"
    if missing:
        named = ", ".join(f"'{mark}'" for mark in missing)
        raise StageError(
            f"prepare.template: writes {', '.join(missing)}, which the model has no token for; "
            f"set lora.new_tokens: [{named}], which adds and trains them, or another "
            "prepare.template, such as plain text that contains {prompt}"
        )
    return ""


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value of JSON's types."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
