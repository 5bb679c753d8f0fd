"""Spans of earlier messages in a rendered prompt, to be learned or not."""

from stages.preparing.answers import EMPTY_THOUGHT, OPENED, after_header, longest_end
from stages.preparing.chat_template import TEMPLATE_FAULTS, ChatTemplate
from stages.preparing.formats import Chat
from stages.preparing.messages import Unusable


def learned_spans(
    template: ChatTemplate, chat: Chat, prompt: str, loss_on: str
) -> list[tuple[int, int]]:
    """Character spans in `prompt` for Rendered.spans, including end marks."""
    everything = loss_on == "all"
    return [
        _span(template, chat, i, prompt)
        for i, message in enumerate(chat.messages[:-1])
        if (everything and i in chat.silent)
        or (loss_on == "assistant" and message["role"] == "assistant" and i not in chat.silent)
    ]


def _span(template: ChatTemplate, chat: Chat, i: int, prompt: str) -> tuple[int, int]:
    """The span of message `i` in `prompt`.

    An answer begins where the prompt for it ends. It is written as when it was the newest, with
    two exceptions: templates drop the thought of earlier answers (Qwen 3) or end them with
    another mark (gpt-oss).
    """
    message = chat.messages[i]
    asked = message["role"] == "assistant"
    try:
        before = template.apply([chat.first(i)], prompt=asked)[0] if i else ""
        after = template.apply([chat.first(i + 1)])[0]
        start: int | None = len(before)
        if asked and not prompt.startswith(before):
            start = after_header(before, template.apply([chat.first(i)])[0], prompt)
    except TEMPLATE_FAULTS as error:
        said = " ".join(str(error).split())
        raise Unusable(
            "template",
            f"the template refuses the part up to message {i + 1} ({said}): set "
            "prepare.loss_on: completion, or another template",
        ) from None
    if not asked and prompt.startswith(after) and after.startswith(before):
        return len(before), len(after)
    span = _written(template, message, before, after, prompt, start) if asked else None
    if span is None:
        raise Unusable(
            "template",
            f"the template writes message {i + 1} differently once the conversation goes "
            "on, or does not end it: set prepare.loss_on: completion, or another template",
        )
    return span


def _written(
    template: ChatTemplate, message: dict, before: str, after: str, prompt: str, start: int | None
) -> tuple[int, int] | None:
    """The span from `start` in `prompt` of the answer that comes last in `after`."""
    opening = before if after.startswith(before) else OPENED.sub("", before)
    written = after[len(opening) :].rstrip()
    if start is None or not after.startswith(opening) or not written.endswith(template.special):
        return None
    words = message["content"].split("</think>")[-1].strip()
    bare = template.without_marks(written)
    # Nemotron replaces a dropped thought by an empty one.
    thought = EMPTY_THOUGHT.match(prompt, start)
    for place in (start, thought.end()) if thought else (start,):
        if part := longest_end(written, prompt, place):
            end = place + len(part)
        elif part := longest_end(bare, prompt, place):
            mark = template.any_special.match(prompt, place + len(part))
            end = mark.end() if mark else place
        if part and words in prompt[place:end]:
            return start, end
    return None
