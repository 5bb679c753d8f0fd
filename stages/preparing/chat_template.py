"""The chat template of a tokenizer, applied to conversations."""

import re

import jinja2

from stages.preparing.formats import Chat

# Errors of a template for a row: from raise_exception(), or Python's, such as of "".index("a").
TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,  # such as of endless recursion in a macro
    TypeError,
    ValueError,
)


def bos_of(tokenizer) -> str:
    """The BOS that the tokenizer adds to plain text; empty if it adds none."""
    first = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids[:1]
    adds = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
    return tokenizer.bos_token if adds else ""


class ChatTemplate:
    """A tokenizer's current template, and its special tokens."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        self.bos = bos_of(tokenizer)
        special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        self.special = tuple(sorted({*special, tokenizer.eos_token}, key=lambda t: (-len(t), t)))
        self.any_special = re.compile("|".join(map(re.escape, self.special)))

    def apply(self, chats: list[Chat], prompt: bool = False) -> list[str]:
        def applied(messages: list, **given) -> list[str]:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt, **given
            )

        if any(chat.given for chat in chats):
            return [applied([chat.messages], **chat.given)[0] for chat in chats]
        return applied([chat.messages for chat in chats]) if chats else []

    def writes(self, chat: Chat, text: str) -> bool:
        try:
            return self.apply([chat])[0] == text
        except TEMPLATE_FAULTS:
            return False

    def without_marks(self, text: str) -> str:
        while mark := next((t for t in self.special if text.endswith(t)), None):
            text = text.removesuffix(mark).rstrip()
        return text
