"""Recognized formats: one raw row becomes one example.

An example is JSON, one of:
- a list of messages ({"role", "content", …}, the assistant's last);
- {"messages", "given", "silent"}, with further template arguments (tools, documents, variables)
  and the indices of messages that are not learned;
- a text, all of which is learned;
- {"text", "answers"}, an already rendered conversation and the character spans of its answers.
"""

import inspect
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from stages.preparing.messages import (
    Unusable,
    blank,
    check_json,
    checked_text,
    conversation,
    decoded,
    kind,
    names_of,
)
from stages.preparing.shapes import Shape, read_rendered
from stages.shared.process import StageError

# Columns that are passed to the template beside the messages, by transformers' argument names.
_GIVEN = ("tools", "documents", "chat_template_kwargs")
# format -> (required columns, optional columns)
COLUMNS = {
    "messages": (("messages",), ("system", *_GIVEN)),
    "sharegpt": (("conversations",), ("system", *_GIVEN)),
    "prompt_completion": (("prompt", "completion"), ("system", "label", *_GIVEN)),
    "alpaca": (("instruction", "output"), ("input", "system", "history", *_GIVEN)),
    "text": (("text",), ()),
    "rendered": (("text",), ()),
}
# Labels as JSON, CSV and columns of numbers with gaps (floats) write them.
_VERDICTS = dict.fromkeys(("true", "1", "1.0"), True) | dict.fromkeys(("false", "0", "0.0"), False)
# Arguments of transformers' own, which a row must not set.
_RESERVED = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"}
Example = list | str | dict


class Chat(NamedTuple):
    """A conversation: messages, template arguments, and indices of messages not to be learned."""

    messages: list[dict]
    given: dict
    silent: list[int]

    def first(self, count: int) -> "Chat":
        return self._replace(messages=self.messages[:count])


def chat_of(example: Example) -> Chat | None:
    """The example as a conversation; None for text."""
    if isinstance(example, list):
        return Chat(example, {}, [])
    return Chat(**example) if isinstance(example, dict) and "messages" in example else None


def text_and_answers(example: Example) -> tuple[str, list[list[int]]]:
    """The text of an example that is not a conversation, and the spans of its answers."""
    if isinstance(example, dict):
        return example["text"], example["answers"]
    assert isinstance(example, str)  # A list is a conversation.
    return example, []


def is_verdict(value) -> bool:
    """Whether a label says if its answer is good or, being blank, says nothing."""
    return blank(value) or _written(value) in _VERDICTS


def _written(value) -> str:
    return str(value).strip().lower()


@dataclass(frozen=True)
class Format:
    """A recognized format. `columns` maps standard column names, optional ones included, to the
    names in the data, `others` to further names that a row may have. `refused` are columns that
    change the meaning of an answer and that the format does not use."""

    name: str
    columns: dict[str, str]
    shape: Shape | None = None
    others: dict[str, tuple[str, ...]] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    # Unused columns and keys of messages, counted while rows are read.
    unused: Counter[str] = field(default_factory=Counter)

    def column(self, row: dict, standard: str) -> str:
        """The name of the standard column in this row."""
        usual = self.columns[standard]
        if blank(row.get(usual)):
            for name in self.others.get(standard, ()):
                if not blank(row.get(name)):
                    return name
        return usual

    def not_used(self, row: dict) -> list[str]:
        """The columns of this row that hold something and are not used."""
        used = {self.column(row, standard) for standard in self.columns}
        return [name for name in row if name not in used and not blank(row[name])]

    def example(self, row: dict, where: str) -> Example:
        """The example of one row.

        Raises Unusable for a row to drop (empty, roles out of order), StageError for a row that
        does not have this format.
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
        """The row's conversation, and the indices of messages that are not to be learned."""
        turns = self._system(row, where)
        if self.name in ("messages", "sharegpt"):
            given = _list(row, self.columns[COLUMNS[self.name][0][0]], where)
            text = given[0].get("content", given[0].get("value"))
            # A column may repeat the conversation's system message.
            turns = given if turns and text == turns[0]["content"] else turns + given
            return conversation(turns, where, self.unused)
        if self.name == "prompt_completion":
            prompt, answer = self.columns["prompt"], self.columns["completion"]
            if not self._labelled_good(row, where):
                raise Unusable(
                    "unlearnable", "its label is false, an answer not to learn: delete it"
                )
            if isinstance(row.get(prompt), list | dict):
                turns += _list(row, prompt, where) + _list(row, answer, where)
                return conversation(turns, where, self.unused)
            asked = _text(row, prompt, where)
        else:
            answer, extra = self.columns["output"], self.column(row, "input")
            turns += self._history(row, where)
            asked = _text(row, self.columns["instruction"], where)
            if row.get(extra) not in (None, ""):
                asked += "\n\n" + _text(row, extra, where)
        turns.append({"role": "user", "content": asked})
        return [*turns, {"role": "assistant", "content": _text(row, answer, where)}], []

    def _labelled_good(self, row: dict, where: str) -> bool:
        """Whether the answer is to be learned, by its label; without one, it is."""
        name = self.columns.get("label")
        value = row.get(name) if name else None
        if not is_verdict(value):
            raise StageError(
                f"{where}: {name!r} tells good answers from bad ones and holds {kind(value)} where "
                "true, false, 1 or 0 belongs; fix it, or name prompt and completion alone in "
                "prepare.columns to leave it out"
            )
        return blank(value) or _VERDICTS[_written(value)]

    def _system(self, row: dict, where: str) -> list[dict]:
        name = self.column(row, "system")
        if row.get(name) in (None, ""):
            return []
        return [{"role": "system", "content": _text(row, name, where)}]

    def _history(self, row: dict, where: str) -> list[dict]:
        """Earlier turns, as pairs of question and answer."""
        name = self.columns["history"]
        pairs = decoded(row.get(name)) or []
        if not isinstance(pairs, list) or not all(
            isinstance(pair, list) and len(pair) == 2 for pair in pairs
        ):
            raise StageError(f"{where}: {name!r} is not a list of [question, answer]; fix it")
        roles = ("user", "assistant")
        return [
            {"role": role, "content": checked_text(text, name, where)}
            for pair in pairs
            for role, text in zip(roles, pair, strict=True)
        ]

    def _given(self, row: dict, where: str) -> dict:
        """Further arguments of apply_chat_template beside the messages."""
        given: dict = {}
        for standard in _GIVEN:
            name = self.column(row, standard)
            value = decoded(row.get(name))
            if value in (None, "", [], {}):
                continue
            variables = standard == "chat_template_kwargs"
            each = [value] if variables else value
            each = [decoded(one) for one in each] if isinstance(each, list) else [each, None]
            if not all(isinstance(one, dict) for one in each):
                belongs = "an object" if variables else "a list of objects"
                raise StageError(
                    f"{where}: {name!r} is passed to the template and must be {belongs}, not "
                    f"{kind(value)}; fix or rename it"
                )
            check_json(each, f"{where}: {name!r}")
            if name == "functions":
                each = [
                    one if "function" in one else {"type": "function", "function": one}
                    for one in each
                ]
            given |= each[0] if variables else {standard: each}
            if variables and (taken := sorted(_RESERVED & value.keys())):
                raise StageError(f"{where}: {name!r} must not set {taken[0]!r}; remove it")
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
    """`value` as a list of turns, if it is JSON text or has one list per key:
    {"role": ["user", …], "content": ["Hi", …]}."""
    value = decoded(value)
    lists = list(value.values()) if isinstance(value, dict) else []
    if all(isinstance(each, list) for each in lists) and len(set(map(len, lists))) == 1:
        return [dict(zip(value, turn, strict=True)) for turn in zip(*lists, strict=True)]
    return value
