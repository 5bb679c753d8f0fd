"""Recognized formats: one raw row becomes one example.

An example is JSON: a list of messages ({"role", "content", …}, the assistant's last), or
{"messages", "given", "silent"} where a template is given more than messages (tools, documents,
its own variables) or places of messages are not to be learned; a text that is learned whole; or
{"text", "answers"}, a conversation rendered already and the character spans of its answers.
"""

import inspect
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
from stages.preparing.shapes import Shape, read_rendered
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


def _value(row: dict, column: str, where: str):
    if column not in row:
        raise StageError(f"{where}: no column {column!r}; this row has {names_of(row)}")
    return row[column]


def _text(row: dict, column: str, where: str) -> str:
    return checked_text(_value(row, column, where), column, where)


def _list(row: dict, column: str, where: str) -> list[dict]:
    value = turns_of(_value(row, column, where))
    if value is None or value == []:
        raise Unusable("empty", f"{column!r} is empty: fill it in or delete the row")
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise StageError(
            f"{where}: {column!r} holds {kind(value)} where a list of messages belongs"
        )
    return value


def turns_of(value):
    """`value` with the turns as objects where they came as JSON text or as one list for each key,
    {"role": ["user", …], "content": ["Hi", …]}."""
    value = decoded(value)
    lists = list(value.values()) if isinstance(value, dict) else []
    if all(isinstance(each, list) for each in lists) and len(set(map(len, lists))) == 1:
        return [dict(zip(value, turn, strict=True)) for turn in zip(*lists, strict=True)]
    return value
