"""Recognized formats: one raw row becomes one example.

An example is JSON: a list of messages ({"role", "content", …}, the assistant's last), a text that
is learned whole, or {"text", "answers"}, a conversation rendered already and the character spans
of its answers.
"""

import difflib
import json
import re
from dataclasses import dataclass
from typing import NamedTuple

from stages.preparing.readers import MAX_ROW_BYTES, too_big
from stages.shared.process import StageError

# format -> (columns it needs, columns it may have)
COLUMNS = {
    "messages": (("messages",), ()),
    "sharegpt": (("conversations",), ("system",)),
    "prompt_completion": (("prompt", "completion"), ("system",)),
    "alpaca": (("instruction", "output"), ("input", "system")),
    "text": (("text",), ()),
    "rendered": (("text",), ()),
}
# Names in well-known sets, offered in the message when no standard column is there.
_OTHER_NAMES = {
    "prompt": ("question", "query", "problem", "instruction", "input", "request"),
    "completion": ("answer", "response", "output", "solution", "target", "reply"),
    "messages": ("conversations", "conversation", "dialog", "dialogue", "chat"),
    "text": ("content", "document", "body"),
}
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
# What may come before each role.
_FOLLOWS = {
    "system": {None},
    "user": {None, "system", "assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}
# What chat templates read of a message beside role and content.
_MESSAGE_KEYS = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
# Why rows are dropped; each is a key of metrics/data.json, dropped_<reason>_examples.
REASONS = ("empty", "roles", "special_token", "template", "too_long", "unlearnable")

Example = list | str | dict


class Unusable(Exception):
    """A row that is dropped and counted: one of REASONS, and what to do."""

    def __init__(self, reason: str, message: str):
        super().__init__(reason, message)
        self.reason, self.message = reason, message


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

    def example(self, row: dict, where: str) -> Example:
        """The example of one row.

        Raises Unusable for a row that is dropped (nothing in it, roles out of order), StageError
        for one that is not of this format at all.
        """
        match self.name:
            case "messages":
                return _conversation(_list(row, self.columns["messages"], where), where)
            case "sharegpt":
                turns = _list(row, self.columns["conversations"], where)
                messages = [_from_sharegpt(turn, where) for turn in turns]
                return _conversation(self._system(row, where) + messages, where)
            case "text":
                return _text(row, self.columns["text"], where)
            case "rendered":
                return self._rendered(_text(row, self.columns["text"], where))
            case "prompt_completion" if isinstance(row.get(self.columns["prompt"]), list | dict):
                prompt = _list(row, self.columns["prompt"], where)
                answer = _list(row, self.columns["completion"], where)
                return _conversation(self._system(row, where) + prompt + answer, where)
            case "prompt_completion":
                prompt = _text(row, self.columns["prompt"], where)
                answer = _text(row, self.columns["completion"], where)
            case "alpaca":
                prompt = _text(row, self.columns["instruction"], where)
                extra = self.columns["input"]
                if row.get(extra) not in (None, ""):
                    prompt += "\n\n" + _text(row, extra, where)
                answer = _text(row, self.columns["output"], where)
        return [
            *self._system(row, where),
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": answer},
        ]

    def _system(self, row: dict, where: str) -> list[dict]:
        name = self.columns["system"]
        if row.get(name) in (None, ""):
            return []
        return [{"role": "system", "content": _text(row, name, where)}]

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
    present = {c: own.get(c, c) for c in known if own.get(c, c) in first}
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
    used = {column: own.get(column, column) for column in (*needed, *optional)}
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
            return name
    guess = {
        standard: other
        for standard, others in _OTHER_NAMES.items()
        for other in others
        if other in first
    }
    fits = [
        n for n, (needed, _) in COLUMNS.items() if all(c in {**present, **guess} for c in needed)
    ]
    if fits:
        pairs = {c: {**guess, **present}[c] for c in COLUMNS[fits[0]][0]}
        remedy = "set prepare.columns: {" + ", ".join(f"{k}: {v}" for k, v in pairs.items()) + "}"
    else:
        remedy = "name yours in prepare.columns, such as {prompt: question, completion: answer}"
    raise StageError(f"{where}: no known format has the columns {names_of(first)}; {remedy}")


def _shape_of(text) -> Shape | None:
    if not isinstance(text, str):
        return None
    return next((shape for shape in SHAPES if shape.marker in text), None)


def names_of(row: dict) -> str:
    """Column names in one short line, whatever is in them."""
    names = ", ".join(" ".join(str(name).split()) for name in row) or "none"
    return names if len(names) <= 200 else names[:200] + "…"


def _value(row: dict, column: str, where: str):
    if column not in row:
        raise StageError(f"{where}: no column {column!r}; this row has {names_of(row)}")
    return row[column]


def _text(row: dict, column: str, where: str) -> str:
    return checked_text(_value(row, column, where), column, where)


def checked_text(value, name: str, where: str) -> str:
    """`value` if it is text that can be learned; `name` is what to call it in the message."""
    if value is None:
        raise Unusable("empty", f"{name!r} is null: fill it in or delete the row")
    if not isinstance(value, str):
        raise StageError(f"{where}: {name!r} holds {_kind(value)} where text belongs; quote it")
    if len(value) > MAX_ROW_BYTES:
        raise too_big(where)
    if "\0" in value:
        raise StageError(f"{where}: {name!r} holds a NUL character; remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise StageError(
            f"{where}: {name!r} holds half a surrogate pair (\\u{ord(value[error.start]):04x}); "
            "write the whole character"
        ) from None
    if not value or value.isspace():
        raise Unusable("empty", f"{name!r} is empty: fill it in or delete the row")
    return value


def _kind(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"a number ({value!s:.20})"
    return {list: "a list", dict: "an object"}.get(type(value), type(value).__name__)


def _list(row: dict, column: str, where: str) -> list[dict]:
    value = _turns(_value(row, column, where))
    if value is None or value == []:
        raise Unusable("empty", f"{column!r} is empty: fill it in or delete the row")
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        what = "text" if isinstance(value, str) else _kind(value)
        raise StageError(f"{where}: {column!r} holds {what} where a list of messages belongs")
    return value


def _turns(value):
    """`value` with the turns as objects where they came as JSON text or as one list for each key,
    {"role": ["user", …], "content": ["Hi", …]}."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    lists = list(value.values()) if isinstance(value, dict) else []
    if all(isinstance(each, list) for each in lists) and len(set(map(len, lists))) == 1:
        return [dict(zip(value, turn, strict=True)) for turn in zip(*lists, strict=True)]
    return value


def _from_sharegpt(turn: dict, where: str) -> dict:
    for key in ("from", "value"):
        if key not in turn:
            raise StageError(f"{where}: a turn without {key!r}; it has {names_of(turn)}")
    role = turn["from"]
    if not isinstance(role, str) or role not in _SHAREGPT_ROLES:
        raise Unusable("roles", f"unknown role {role!r}: use {', '.join(_SHAREGPT_ROLES)}")
    return {"role": _SHAREGPT_ROLES[role], "content": turn["value"]}


def _conversation(turns: list[dict], where: str) -> list[dict]:
    """Checked messages with the keys that templates read."""
    messages, before = [], None
    for number, turn in enumerate(turns, 1):
        if "role" not in turn:
            raise StageError(f"{where}: message {number} has no 'role'; it has {names_of(turn)}")
        role = turn["role"]
        if not isinstance(role, str) or role not in _FOLLOWS:
            raise Unusable(
                "roles", f"message {number}: unknown role {role!r}: use {', '.join(_FOLLOWS)}"
            )
        if before not in _FOLLOWS[role]:
            after = f"follows {before}" if before else "comes first"
            raise Unusable("roles", f"message {number}: {role} {after}: mend or delete the row")
        message = {"role": role}
        # Parquet gives every message every key: an empty list of calls is no call.
        message |= {key: turn[key] for key in _MESSAGE_KEYS if turn.get(key)}
        content = turn.get("content")
        if isinstance(content, list):
            content = _joined(content, number, where)
        if content in (None, "") and "tool_calls" in message:
            content = ""
        else:
            content = checked_text(content, f"message {number} ({role})", where)
        if len(message) > 1:
            _check_extras(message, f"{where}: message {number}")
        messages.append(message | {"content": content})
        before = role
    if before != "assistant":
        raise Unusable("roles", f"ends with {before}: the last message must be the assistant's")
    return messages


def _check_extras(message: dict, where: str) -> None:
    """Tool calls and the like must be JSON with whole characters; a Parquet file can hold more."""
    try:
        json.dumps(message, ensure_ascii=False).encode()
    except (TypeError, UnicodeEncodeError) as error:
        raise StageError(f"{where}: a tool call that is no JSON ({error}); mend it") from None


def _joined(parts: list, number: int, where: str) -> str:
    """The text of a content given in parts, such as [{"type": "text", "text": "Hi"}]."""
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise StageError(f"{where}: message {number} has a part that is not text; remove it")
    return "".join(part["text"] for part in parts)
