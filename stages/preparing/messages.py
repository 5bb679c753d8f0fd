"""The turns of a conversation, checked and converted to messages for chat templates.

Data sets name roles and keys differently; this module maps the names. Unknown keys are counted,
so that nothing is lost silently.
"""

import json
from collections import Counter
from collections.abc import Iterable

from stages.shared.opening import MAX_ROW_BYTES, too_big
from stages.shared.process import StageError

# Reasons to drop rows; each is a key of metrics/data.json, dropped_<reason>_examples.
REASONS = ("empty", "roles", "special_token", "template", "too_long", "unlearnable")
_NAMES = {
    "system": ("system", "developer"),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "model", "chatgpt", "function_call", "tool_call"),
    "tool": ("tool", "observation", "function_response", "function", "ipython"),
}
_ROLES = {name: role for role, names in _NAMES.items() for name in names}
# Roles that may precede each role.
_FOLLOWS: dict[str, set[str | None]] = {
    "system": {None},
    "user": {None, "system", "assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}
# Name in data sets -> key that chat templates read. The first three mean the same; templates
# differ in which one they read.
_KEYS = {
    "reasoning_content": "reasoning_content",
    "reasoning": "reasoning_content",
    "thinking": "reasoning_content",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "tool_call_id": "tool_call_id",
    "name": "name",
}
# Names of a tool call's arguments: transformers', Llama's, Anthropic's and LangChain's.
_ARGUMENTS = ("arguments", "parameters", "input", "args")
_CONTENT = {"content", "value"}
# Keys that switch learning of a message on or off.
_SWITCHES = ("weight", "train", "training", "trainable", "loss")


class Unusable(Exception):
    """A row that is dropped and counted: one of REASONS, and what to do."""

    def __init__(self, reason: str, message: str):
        super().__init__(reason, message)
        self.reason, self.message = reason, message


def conversation(
    turns: list[dict], where: str, unused: Counter[str]
) -> tuple[list[dict], list[int]]:
    """(messages, indices of those not to be learned) from turns with role and content, or with
    from and value. Keys that no template reads are counted in `unused`.

    Raises Unusable for turns out of order or without text, StageError for anything but a turn.
    """
    messages: list[dict] = []
    silent: list[int] = []
    before: str | None = None
    for number, turn in enumerate(turns, 1):
        at = f"message {number}"
        left = {key: turn[key] for key in turn.keys() - _CONTENT if not blank(turn[key])}
        role, name = _role(left, turn, at, where)
        learned = not left or _switched(left, role, f"{where}: {at}", unused)
        content = turn.get("content", turn.get("value"))
        if role == "system" and blank(content):
            continue
        if before not in _FOLLOWS[role]:
            after = f"follows {before}" if before else "comes first"
            raise Unusable("roles", f"{at}: {role} {after}: fix or delete the row")
        before = role
        message = {"role": role}
        if name in ("function_call", "tool_call"):
            left["tool_calls"], content = content, None
        for key in [key for key in _KEYS if key in left]:
            if message.setdefault(_KEYS[key], left[key]) == left[key]:
                del left[key]
        if len(message) > 1:
            _check_extras(message, at, where)
        if isinstance(content, list):
            content = _joined(content, at, where)
        if content in (None, "", []) and "tool_calls" in message:
            content = ""
        else:
            content = checked_text(content, f"{at} ({role})", where)
        if left:
            unused.update(f"message key {key}" for key in left)
        if not learned:
            silent.append(len(messages))
        messages.append(message | {"content": content})
    if before != "assistant":
        raise Unusable("roles", f"ends with {before}: the last message must be the assistant's")
    return messages, silent


def blank(value) -> bool:
    """Whether the value means an absent key or column: in Parquet every message has every key."""
    return value in (None, "", [], {}) or (isinstance(value, str) and value.isspace())


def _role(left: dict, turn: dict, at: str, where: str) -> tuple[str, str]:
    """The role and its name in the data, removed from `left`."""
    if "from" in turn and "role" not in turn:
        if "value" not in turn and "content" not in turn and "tool_calls" not in turn:
            raise StageError(f"{where}: {at}: a turn without 'value'; it has {names_of(turn)}")
    elif "role" not in turn:
        raise StageError(f"{where}: {at} has no 'role'; it has {names_of(turn)}")
    name = left.pop("role", None) or left.pop("from", None)
    if not isinstance(name, str) or name not in _ROLES:
        raise Unusable("roles", f"{at}: unknown role {name!r}: use {', '.join(_ROLES)}")
    return _ROLES[name], name


def _switched(left: dict, role: str, where: str, unused: Counter[str]) -> bool:
    """Whether the message is to be learned, by the switches in `left`."""
    learned = True
    for key in _SWITCHES:
        value = left.pop(key, None)
        if value not in (None, 0, 1):
            raise StageError(f"{where}: {key!r} holds {kind(value)} where 0 or 1 belongs")
        learned = learned and value != 0
        if value and role != "assistant":
            unused[f"message key {key} of role {role}"] += 1
    return learned


def _check_extras(message: dict, at: str, where: str) -> None:
    """Check the keys beside the content, and decode arguments of calls in place."""
    thought = "reasoning_content"
    if thought in message:
        message[thought] = checked_text(message[thought], f"{thought} of {at}", where)
    if "tool_calls" in message:
        calls = decoded(message["tool_calls"])
        calls = calls if isinstance(calls, list) else [calls]
        if not all(isinstance(call, dict) for call in calls):
            raise Unusable("roles", f"{at}: a tool call that is not a JSON object: fix the row")
        message["tool_calls"] = [_call(call, at) for call in calls]
    check_json(message, f"{where}: {at}: a tool call")
    if not all(call["function"].get("name") for call in message.get("tool_calls", ())):
        raise Unusable("roles", f"{at}: a tool call without a name: fix or delete the row")


def _call(call: dict, at: str) -> dict:
    """The call in transformers' form, with arguments decoded to an object."""
    function = call.get("function")
    if not isinstance(function, dict):
        function = {key: call[key] for key in ("name", *_ARGUMENTS) if key in call}
        rest = {k: v for k, v in call.items() if k not in (*function, "type")}
        call = {"type": "function"} | rest
    given = [key for key in _ARGUMENTS if function.get(key) not in (None, "")]
    # The first that is given: beside it, `parameters` may be the function's schema.
    if name := next((key for key in (*given, *_ARGUMENTS) if key in function), None):
        arguments = decoded(function[name] or {})
        if isinstance(arguments, str) and arguments.lstrip().startswith("{"):
            raise Unusable("roles", f"{at}: arguments that are broken JSON: fix or delete the row")
        kept = {k: v for k, v in function.items() if k == name or k not in _ARGUMENTS}
        function = {("arguments" if k == name else k): v for k, v in kept.items()}
        function["arguments"] = arguments
    return call | {"function": function}


def decoded(value):
    """The value of JSON text of an object or array; anything else unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def check_json(value, what: str) -> None:
    """Raise StageError unless `value` is valid JSON in valid Unicode; Parquet allows more."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, UnicodeEncodeError) as error:
        raise StageError(f"{what} that is not JSON ({error}); fix it") from None


def names_of(row: Iterable) -> str:
    """Column names as one short line, cut and escaped."""
    names = ", ".join(" ".join(str(name).split()) for name in row) or "none"
    return names if len(names) <= 200 else names[:200] + "…"


def checked_text(value, name: str, where: str) -> str:
    """`value` if it is text that can be learned; `name` is for the error message."""
    if value is None:
        raise Unusable("empty", f"{name!r} is null: fill it in or delete the row")
    if not isinstance(value, str):
        raise StageError(f"{where}: {name!r} holds {kind(value)} where text belongs; quote it")
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


def kind(value) -> str:
    """The kind of a value, in words for an error message."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"a number ({value!s:.20})"
    names: dict[type, str] = {list: "a list", dict: "an object", str: "text"}
    return names.get(type(value), getattr(value, "kind", type(value).__name__))


def _joined(parts: list, at: str, where: str) -> str:
    """The text of a content given in parts, such as [{"type": "text", "text": "Hi"}]."""
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise StageError(f"{where}: {at} has a part that is not text; remove it")
    return "".join(part["text"] for part in parts)
