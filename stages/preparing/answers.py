"""Answers within rendered conversations: how the template wrote them, and their position."""

import json
import re

from stages.preparing.formats import Chat

# The end of a prompt that opens the model's thought, or says that there is none.
OPENED = re.compile(r"<think>\s*(</think>\s*)?\Z")
EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>")


def with_text_arguments(chat: Chat) -> Chat:
    """The conversation for templates that expect the arguments of a call as JSON text."""
    messages = json.loads(json.dumps(chat.messages))
    for message in messages:
        for call in message.get("tool_calls", ()):
            arguments = call["function"].get("arguments")
            if isinstance(arguments, dict):
                call["function"]["arguments"] = json.dumps(arguments, ensure_ascii=False)
    return chat._replace(messages=messages)


def longest_end(text: str, prompt: str, place: int) -> str:
    """The longest suffix of `text` found at `place` in `prompt`; empty for none."""
    # A few characters are compared first, since the text may be long.
    begins = (k for k in range(len(text)) if prompt.startswith(text[k : k + 16], place))
    return next((text[k:] for k in begins if prompt.startswith(text[k:], place)), "")


def after_header(before: str, history: str, prompt: str) -> int | None:
    """Where the answer to `before` begins in `prompt`, which may lack earlier thoughts: after the
    same number of answer headers."""
    bare = OPENED.sub("", before)
    header = bare[len(history) :] if bare.startswith(history) else ""
    if not header or prompt.count(header) < bare.count(header):
        return None
    return len(header.join(prompt.split(header)[: bare.count(header)])) + len(header)


def thought_and_answer(message: dict, whole: str, prompt: str) -> str:
    """The thought and answer that follow a prompt that opens a thought, for templates that omit
    the thought in `whole` (DeepSeek); empty if `whole` differs for another reason."""
    thought, _, words = message["content"].rpartition("</think>")
    _, opened, thought = thought.partition("<think>")
    if "reasoning_content" in message:
        opened, thought = "<think>", message["reasoning_content"] + "\n"
        words = "\n\n" + words
    bare = OPENED.sub("", prompt)
    rest = whole[len(bare) :]
    written = words if rest.startswith(words) else words.lstrip("\n")
    if (
        not opened
        or prompt.rstrip().endswith("</think>")
        or not (whole.startswith(bare) and rest.startswith(written))
    ):
        return ""
    return thought.lstrip("\n") + "</think>" + words + rest[len(written) :]


def printed(chat: Chat, whole: str) -> bool:
    """Whether the template wrote arguments as Python prints dicts, since it expects text."""
    calls = [call for message in chat.messages for call in message.get("tool_calls", ())]
    every = [call["function"].get("arguments") for call in calls]
    texts = [str(each) for each in every if each and isinstance(each, dict)]
    contents = "\n".join(message["content"] for message in chat.messages) if texts else ""
    return any(whole.count(each) > contents.count(each) for each in texts)


def holds(text: str, part: str) -> bool:
    """Whether `part` is in `text`, ignoring white space, or quoted as Llama 3 has tool output."""
    if part.strip() in text:
        return True
    text, quoted = "".join(text.split()), json.dumps(part, ensure_ascii=False)[1:-1]
    return any("".join(each.split()) in text for each in (part, quoted))
