"""Already rendered conversations: finds the turns in the text."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from stages.preparing.messages import Unusable


@dataclass(frozen=True)
class Shape:
    """How a family of models renders a conversation, to parse already rendered rows."""

    name: str
    marker: str
    # What begins a turn, hence never occurs within one, and the token that ends one.
    start: str
    end: str
    # Groups role, content and end (or system, user and assistant, the last including its end).
    turn: re.Pattern
    template: str


# Other ends of a turn, and what may be between two turns.
_OTHER_END = r"(?:<\|\w+\|>|</s>|<eos>)"
_BETWEEN = re.compile(rf"(?:\s|{_OTHER_END}|<s>|<bos>)*")


def _tagged(name: str, before: str, after: str, end: str, newline: str, assistant: str) -> Shape:
    """A shape whose turns are `before` role `after` content `end` newline."""
    start = re.escape(before)
    # Other end marks, such as <|eom_id|>, may legitimately occur in text.
    ends = rf"{re.escape(end)}|{_OTHER_END}(?=\s*(?:{start}|\Z))|(?={start})|\Z"
    turn = rf"{start}(?P<role>\w+){re.escape(after)}(?P<content>.*?)(?P<end>{ends})"
    renamed = f"('{assistant}' if m['role'] == 'assistant' else m['role'])"
    return Shape(
        name,
        before + assistant + after,
        before,
        end,
        re.compile(turn, re.DOTALL),
        f"{{% for m in messages %}}{{{{ {before!r} + {renamed} + {after!r} + m['content'] + "
        f"{end + newline!r} }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {before + assistant + after!r} }}}}{{% endif %}}",
    )


SHAPES = (
    Shape(
        "llama-2",
        "[/INST]",
        "[INST]",
        "</s>",
        re.compile(
            r"(?:<s>)?\s*\[INST\] ?(?:<<SYS>>\n(?P<system>.*?)\n<</SYS>>\n\n)?(?P<user>.*?) ?"
            r"\[/INST\](?P<assistant>.*?)(?:\s?</s>|(?=<s>|\[INST\])|\Z)",
            re.DOTALL,
        ),
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<s>[INST] ' }}"
        "{% if loop.index0 == 1 and messages[0]['role'] == 'system' %}"
        "{{ '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' }}{% endif %}"
        "{{ m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}"
        "{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}",
    ),
    _tagged("chatml", "<|im_start|>", "\n", "<|im_end|>", "\n", "assistant"),
    _tagged(
        "llama-3", "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", "", "assistant"
    ),
    _tagged("gemma", "<start_of_turn>", "\n", "<end_of_turn>", "\n", "model"),
)


def shape_of(text) -> Shape | None:
    if not isinstance(text, str):
        return None
    return next((shape for shape in SHAPES if shape.marker in text), None)


class Turn(NamedTuple):
    """A turn of a rendered text; `start` to `stop` covers the content and `end`, the end mark."""

    role: str
    content: str
    start: int
    stop: int
    end: str


def read_rendered(shape: Shape, text: str) -> list[Turn]:
    """The turns of `text`. Raises Unusable if one does not end or its bounds are ambiguous."""
    turns: list[Turn] = []
    after = None
    for match in shape.turn.finditer(text):
        _check_gap(shape, text[after : match.start()], opening=after is None)
        turns += _of_match(match)
        after = match.end()
    _check_gap(shape, text[after:], opening=after is None)
    for turn in turns:
        if shape.start in turn.content:
            raise _unclear(shape)
        if "role" in shape.turn.groupindex and not turn.end:
            raise Unusable(
                "roles", f"the {turn.role}'s turn does not end with {shape.end!r}: complete it"
            )
    return turns


def _of_match(match: re.Match) -> list[Turn]:
    groups = match.groupdict()
    if "role" in groups:
        role = "assistant" if groups["role"] == "model" else groups["role"]
        return [Turn(role, groups["content"], match.start("content"), match.end(), groups["end"])]
    # The space that the shape puts before an answer is learned.
    return [
        Turn(
            role,
            groups[role].removeprefix(" "),
            match.start(role),
            match.end() if role == "assistant" else match.end(role),
            "",
        )
        for role in ("system", "user", "assistant")
        if groups[role] is not None
    ]


def _check_gap(shape: Shape, gap: str, opening: bool) -> None:
    """Raise Unusable if text before, between or after turns might be part of one."""
    if shape.start in gap or not (opening or _BETWEEN.fullmatch(gap)):
        raise _unclear(shape)


def _unclear(shape: Shape) -> Unusable:
    return Unusable(
        "special_token",
        f"text outside of turns, or {shape.start!r} or {shape.end!r} within one: the bounds of a "
        "turn are ambiguous; fix or delete the row",
    )
