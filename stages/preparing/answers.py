"""Answers within rendered conversations: what a template made of them, and where they stand."""

import json
import re

from stages.preparing.formats import Chat

# What a prompt ends with that opens the model's thought, or says that there is none.
OPENED = re.compile(r"<think>\s*(</think>\s*)?\Z")
EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>")


def with_text_arguments(chat: Chat) -> Chat:
    """The conversation for templates that take the arguments of a call as JSON text."""
    messages = json.loads(json.dumps(chat.messages))
    for message in messages:
        for call in message.get("tool_calls", ()):
            arguments = call["function"].get("arguments")
            if isinstance(arguments, dict):
                call["function"]["arguments"] = json.dumps(arguments, ensure_ascii=False)
    return chat._replace(messages=messages)


def longest_end(text: str, prompt: str, place: int) -> str:
    """The longest end of `text` that stands at `place` in `prompt`; empty for none."""
    # A few characters are compared before all, as the text may be long.
    begins = (k for k in range(len(text)) if prompt.startswith(text[k : k + 16], place))
    return next((text[k:] for k in begins if prompt.startswith(text[k:], place)), "")


def after_header(before: str, history: str, prompt: str) -> int | None:
    """Where in `prompt`, whose earlier thoughts may be left out, the answer begins that `before`
    asks for: after as many headers of an answer."""
    bare = OPENED.sub("", before)
    header = bare[len(history) :] if bare.startswith(history) else ""
    if not header or prompt.count(header) < bare.count(header):
        return None
    return len(header.join(prompt.split(header)[: bare.count(header)])) + len(header)


def thought_and_answer(message: dict, whole: str, prompt: str) -> str:
    """What follows a prompt that opens a thought, where the template leaves out the answer's
    (DeepSeek); empty if that is not why `whole` goes on otherwise."""
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
    """Whether the template wrote arguments as Python prints them, since it takes text."""
    calls = [call for message in chat.messages for call in message.get("tool_calls", ())]
    every = [call["function"].get("arguments") for call in calls]
    texts = [str(each) for each in every if each and isinstance(each, dict)]
    contents = "\n".join(message["content"] for message in chat.messages) if texts else ""
    return any(whole.count(each) > contents.count(each) for each in texts)


def holds(text: str, part: str) -> bool:
    """Whether `part` is in `text`, white space aside, or in quotes as Llama 3 has tool output."""
    if part.strip() in text:
        return True
    text, quoted = "".join(text.split()), json.dumps(part, ensure_ascii=False)[1:-1]
    return any("".join(each.split()) in text for each in (part, quoted))
