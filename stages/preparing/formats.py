"""Recognized formats: one raw row becomes one example.

An example is JSON: a list of messages ({"role", "content", …}, the assistant's last), or
{"messages", "given", "silent"} where a template is given more than messages (tools, documents,
its own variables) or places of messages are not to be learned; a text that is learned whole; or
{"text", "answers"}, a conversation rendered already and the character spans of its answers.
"""

import difflib
import inspect
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from stages.preparing.messages import (
    Unusable,
    check_json,
    checked_text,
    conversation,
    decoded,
    kind,
    names_of,
)
from stages.shared.process import StageError

# Columns that reach the template beside the messages, by the names that transformers has.
_GIVEN = ("tools", "documents", "chat_template_kwargs")
# format -> (columns it needs, columns it may have)
COLUMNS = {
    "messages": (("messages",), ("system", *_GIVEN)),
    "sharegpt": (("conversations",), ("system", *_GIVEN)),
    "prompt_completion": (("prompt", "completion"), ("system", "label", *_GIVEN)),
    "alpaca": (("instruction", "output"), ("input", "system", "history", *_GIVEN)),
    "text": (("text",), ()),
    "rendered": (("text",), ()),
}
# Names that mean the same in any data set: taken where the standard column is not there.
_SAME = {
    "system": ("system_prompt", "system_message"),
    "input": ("context",),
    "output": ("response",),
    "tools": ("functions",),
}
# Names in well-known sets, offered in the message when no standard column is there.
_OTHER_NAMES = {
    "prompt": ("question", "query", "problem", "instruction", "input", "request"),
    "completion": ("answer", "response", "output", "solution", "target", "reply"),
    "instruction": ("prompt", "question", "query", "problem", "request"),
    "output": ("completion", "answer", "solution", "target", "reply"),
    "messages": ("conversations", "conversation", "dialog", "dialogue", "chat"),
    "text": ("content", "document", "body"),
}
# Columns without which an answer would mean something else.
_MEANING = ("input", "history")
# What a row may not give a template: transformers' own arguments, which are no variables of it.
_RESERVED = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"}
Example = list | str | dict


class Chat(NamedTuple):
    """A conversation: what the template is given, and places of messages not to be learned."""

    messages: list[dict]
    given: dict
    silent: list[int]

    def first(self, count: int) -> "Chat":
        return self._replace(messages=self.messages[:count])


def chat_of(example: Example) -> Chat | None:
    """The conversation that the example is; None for text."""
    if isinstance(example, list):
        return Chat(example, {}, [])
    return Chat(**example) if isinstance(example, dict) and "messages" in example else None


def text_and_answers(example: Example) -> tuple[str, list[list[int]]]:
    """The text of an example that is no conversation, and the spans of its answers."""
    if isinstance(example, dict):
        return example["text"], example["answers"]
    assert isinstance(example, str)  # A list is a conversation.
    return example, []


@dataclass(frozen=True)
class Shape:
    """How a family of models writes a conversation as text: to read rows rendered already."""

    name: str
    marker: str
    # What begins a turn and so is in none, and the token that ends one.
    start: str
    end: str
    # Groups role, content and end (or system, user and assistant, of which the last holds its end).
    turn: re.Pattern
    template: str


# What ends a turn in another way than its shape does, and what may stand between two turns.
_OTHER_END = r"(?:<\|\w+\|>|</s>|<eos>)"
_BETWEEN = re.compile(rf"(?:\s|{_OTHER_END}|<s>|<bos>)*")


def _tagged(name: str, before: str, after: str, end: str, newline: str, assistant: str) -> Shape:
    """A shape whose turns are `before` role `after` content `end` newline."""
    start = re.escape(before)
    # Of the other marks that a turn may end with, such as <|eom_id|>, text may be about some.
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


@dataclass(frozen=True)
class Format:
    """A recognized format. `columns` maps each standard column, the optional ones too, to the
    data's own name."""

    name: str
    columns: dict[str, str]
    shape: Shape | None = None
    # Keys of messages that are not used, counted while rows are read.
    unused: Counter[str] = field(default_factory=Counter)

    def example(self, row: dict, where: str) -> Example:
        """The example of one row.

        Raises Unusable for a row that is dropped (nothing in it, roles out of order), StageError
        for one that is not of this format at all.
        """
        if self.name == "text":
            return _text(row, self.columns["text"], where)
        if self.name == "rendered":
            return self._rendered(_text(row, self.columns["text"], where))
        messages, silent = self._messages(row, where)
        given = self._given(row, where)
        if given or silent:
            return Chat(messages, given, silent)._asdict()
        return messages

    def _messages(self, row: dict, where: str) -> tuple[list[dict], list[int]]:
        """The row's conversation, and the places of messages that are not to be learned."""
        turns = self._system(row, where)
        if self.name in ("messages", "sharegpt"):
            given = _list(row, self.columns[COLUMNS[self.name][0][0]], where)
            text = given[0].get("content", given[0].get("value"))
            # A column may repeat the system message of the conversation.
            turns = given if turns and text == turns[0]["content"] else turns + given
            return conversation(turns, where, self.unused)
        if self.name == "prompt_completion":
            prompt, answer = self.columns["prompt"], self.columns["completion"]
            if str(row.get(self.columns["label"])).lower() == "false":
                raise Unusable(
                    "unlearnable", "its label is false, an answer not to learn: delete it"
                )
            if isinstance(row.get(prompt), list | dict):
                turns += _list(row, prompt, where) + _list(row, answer, where)
                return conversation(turns, where, self.unused)
            asked = _text(row, prompt, where)
        else:
            answer, extra = self.columns["output"], self.columns["input"]
            turns += self._history(row, where)
            asked = _text(row, self.columns["instruction"], where)
            if row.get(extra) not in (None, ""):
                asked += "\n\n" + _text(row, extra, where)
        turns.append({"role": "user", "content": asked})
        return [*turns, {"role": "assistant", "content": _text(row, answer, where)}], []

    def _system(self, row: dict, where: str) -> list[dict]:
        name = self.columns["system"]
        if row.get(name) in (None, ""):
            return []
        return [{"role": "system", "content": _text(row, name, where)}]

    def _history(self, row: dict, where: str) -> list[dict]:
        """Earlier questions and answers, in pairs."""
        name = self.columns["history"]
        pairs = decoded(row.get(name)) or []
        if not isinstance(pairs, list) or not all(
            isinstance(pair, list) and len(pair) == 2 for pair in pairs
        ):
            raise StageError(f"{where}: {name!r} holds no list of [question, answer]; mend it")
        roles = ("user", "assistant")
        return [
            {"role": role, "content": checked_text(text, name, where)}
            for pair in pairs
            for role, text in zip(roles, pair, strict=True)
        ]

    def _given(self, row: dict, where: str) -> dict:
        """What the template is given beside the messages, as arguments of apply_chat_template."""
        given: dict = {}
        for standard in _GIVEN:
            name = self.columns[standard]
            value = decoded(row.get(name))
            if value in (None, "", [], {}):
                continue
            variables = standard == "chat_template_kwargs"
            each = [value] if variables else value
            each = [decoded(one) for one in each] if isinstance(each, list) else [each, None]
            if not all(isinstance(one, dict) for one in each):
                belongs = "an object" if variables else "a list of objects"
                raise StageError(
                    f"{where}: {name!r} holds {kind(value)} where {belongs} belongs, which the "
                    "template is given; mend or rename it"
                )
            check_json(each, f"{where}: {name!r}")
            if name == "functions":
                each = [{"type": "function", "function": one} for one in each]
            given |= each[0] if variables else {standard: each}
            if variables and (taken := sorted(_RESERVED & value.keys())):
                raise StageError(f"{where}: {name!r} holds {taken[0]!r}, no variable of a template")
        return given

    def _rendered(self, text: str) -> Example:
        if self.shape is None:
            return {"text": text, "answers": []}
        turns = read_rendered(self.shape, text)
        answers = [[turn.start, turn.stop] for turn in turns if turn.role == "assistant"]
        if not answers or not text[answers[-1][0] : answers[-1][1]].strip():
            raise Unusable("roles", f"no answer after {self.shape.marker!r}: complete or delete it")
        if turns[-1].role != "assistant":
            raise Unusable("roles", f"ends with the {turns[-1].role}'s turn: complete or delete it")
        return {"text": text, "answers": answers}


class Turn(NamedTuple):
    """A turn of a rendered text; `start` and `stop` span the content and `end`, its end mark."""

    role: str
    content: str
    start: int
    stop: int
    end: str


def read_rendered(shape: Shape, text: str) -> list[Turn]:
    """The turns of `text`. Raises Unusable where one does not end, or its bounds are in doubt."""
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
    # The shape puts a space before an answer; it belongs to what is learned.
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
    """What stands before, between and after turns must be no part of one."""
    if shape.start in gap or not (opening or _BETWEEN.fullmatch(gap)):
        raise _unclear(shape)


def _unclear(shape: Shape) -> Unusable:
    return Unusable(
        "special_token",
        f"text outside of turns, or {shape.start!r} or {shape.end!r} within one: where a turn "
        "begins and ends is in doubt; mend or delete the row",
    )


def recognize(name: str, columns: dict[str, str] | None, first: dict, where: str) -> Format:
    """The format of a data set by its first row, or the format called `name`, held to that row.

    `columns` maps standard names to the data's own. Raises StageError when nothing fits.
    """
    own = columns or {}
    known = sorted({c for needed, more in COLUMNS.values() for c in (*needed, *more)})
    for standard, column in own.items():
        if standard not in known:
            near = difflib.get_close_matches(standard, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise StageError(f"params.yaml: prepare.columns: unknown name {standard!r}; {hint}")
        if column not in first:
            raise StageError(
                f"{where}: no column {column!r} (prepare.columns.{standard}); "
                f"the columns are {names_of(first)}"
            )
    # Who names columns gets those alone.
    called = {c: own.get(c, c) if own else _name_in(first, c) for c in known}
    present = {c: column for c, column in called.items() if column in first}
    if name == "auto":
        name = _recognized(present, own, first, where)
    needed, optional = COLUMNS[name]
    for standard in own:
        if standard not in (*needed, *optional):
            raise StageError(
                f"params.yaml: prepare.columns: format {name} has no {standard!r}, only "
                f"{', '.join((*needed, *optional))}"
            )
    for column in needed:
        if column not in present:
            raise StageError(
                f"{where}: no column {own.get(column, column)!r}, which format {name} needs; the "
                f"columns are {names_of(first)}: name yours in prepare.columns: {{{column}: …}}"
            )
    # An optional column may come in a later row alone.
    used = {column: called[column] for column in (*needed, *optional)}
    shape = _shape_of(first[used["text"]]) if name == "rendered" else None
    return Format(name, used, shape)


def _recognized(present: dict[str, str], own: dict[str, str], first: dict, where: str) -> str:
    for name, (needed, optional) in COLUMNS.items():
        if set(needed) <= present.keys() and own.keys() <= {*needed, *optional}:
            if name == "text" and _shape_of(first[present["text"]]):
                return "rendered"
            match _turns(first.get(present.get("conversations"))):
                case [{"role": _}, *_] if name == "sharegpt":
                    continue
            lost = [present[c] for c in _MEANING if c in present and c not in optional]
            if name == "prompt_completion" and lost and not own:
                raise StageError(
                    f"{where}: format {name} would not use {lost[0]!r}; {_remedy(present, first)}, "
                    "or name prompt and completion alone to leave it out"
                )
            return name
    raise StageError(
        f"{where}: no known format has the columns {names_of(first)}; {_remedy(present, first)}"
    )


def _remedy(present: dict[str, str], first: dict) -> str:
    """The setting of prepare.columns that keeps most columns."""
    guess = {
        standard: other
        for standard, others in _OTHER_NAMES.items()
        for other in reversed(others)
        if other in first
    } | present
    fits = [
        {c: guess[c] for c in (*needed, *optional) if c in guess}
        for needed, optional in COLUMNS.values()
        if all(c in guess for c in needed)
    ]
    if not fits:
        return "name yours in prepare.columns, such as {prompt: question, completion: answer}"
    # The first of those that keep as many.
    pairs = max(fits, key=lambda pairs: len(set(pairs.values())))
    return "set prepare.columns: {" + ", ".join(f"{k}: {v}" for k, v in pairs.items()) + "}"


def _name_in(first: dict, standard: str) -> str:
    """What the standard column is called in this data."""
    names = (standard, *_SAME.get(standard, ()))
    return next((name for name in names if name in first), standard)


def _shape_of(text) -> Shape | None:
    if not isinstance(text, str):
        return None
    return next((shape for shape in SHAPES if shape.marker in text), None)


def _value(row: dict, column: str, where: str):
    if column not in row:
        raise StageError(f"{where}: no column {column!r}; this row has {names_of(row)}")
    return row[column]


def _text(row: dict, column: str, where: str) -> str:
    return checked_text(_value(row, column, where), column, where)


def _list(row: dict, column: str, where: str) -> list[dict]:
    value = _turns(_value(row, column, where))
    if value is None or value == []:
        raise Unusable("empty", f"{column!r} is empty: fill it in or delete the row")
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise StageError(
            f"{where}: {column!r} holds {kind(value)} where a list of messages belongs"
        )
    return value


def _turns(value):
    """`value` with the turns as objects where they came as JSON text or as one list for each key,
    {"role": ["user", …], "content": ["Hi", …]}."""
    value = decoded(value)
    lists = list(value.values()) if isinstance(value, dict) else []
    if all(isinstance(each, list) for each in lists) and len(set(map(len, lists))) == 1:
        return [dict(zip(value, turn, strict=True)) for turn in zip(*lists, strict=True)]
    return value
