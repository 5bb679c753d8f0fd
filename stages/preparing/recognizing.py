"""Recognizes the format of a data set by the columns of its first row.

Optional columns may come in later rows, by any of their names; those that must not be lost are
refused in every row.
"""

import difflib

from stages.preparing.formats import COLUMNS, Format, is_verdict, turns_of
from stages.preparing.messages import blank, names_of
from stages.preparing.shapes import shape_of
from stages.shared.process import StageError

# Unambiguous synonyms, used if the standard column is missing.
_SAME = {
    "system": ("system_prompt", "system_message"),
    "input": ("context",),
    "output": ("response",),
    "tools": ("functions",),
}
# Names in well-known sets, suggested in the error message.
_OTHER_NAMES = {
    "prompt": ("question", "query", "problem", "instruction", "input", "request"),
    "completion": ("answer", "response", "output", "solution", "target", "reply"),
    "instruction": ("prompt", "question", "query", "problem", "request"),
    "output": ("completion", "answer", "solution", "target", "reply"),
    "messages": ("conversations", "conversation", "dialog", "dialogue", "chat"),
    "text": ("content", "document", "body"),
}
# Columns that change the meaning of an answer, so they must not be ignored.
_MEANING = ("input", "history")
_NEEDED = {c for needed, _ in COLUMNS.values() for c in needed}
_KNOWN = sorted({c for needed, more in COLUMNS.values() for c in (*needed, *more)})


def recognize(
    name: str, columns: dict[str, str] | None, first: dict, where: str, section: str = "prepare"
) -> Format:
    """The format of a data set by its first row, or the format `name`, checked against that row.

    `columns` maps standard names to the data's own; both come from `section` of params.yaml.
    Raises StageError if no format fits.
    """
    own = columns or {}
    for standard, column in own.items():
        if standard not in _KNOWN:
            near = difflib.get_close_matches(standard, _KNOWN, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(_KNOWN)}"
            raise StageError(f"params.yaml: {section}.columns: unknown name {standard!r}; {hint}")
        if column not in first and standard in _NEEDED:
            raise StageError(
                f"{where}: no column {column!r} ({section}.columns.{standard}); "
                f"the columns are {names_of(first)}"
            )
    # Named columns are used exclusively.
    called = {c: own.get(c, c) if own else _name_in(first, c) for c in _KNOWN}
    present = {c: column for c, column in called.items() if column in first}
    if recognized := name == "auto":
        name = _recognized(present, own, first, where, section)
    needed, optional = COLUMNS[name]
    for standard in own:
        if standard not in (*needed, *optional):
            raise StageError(
                f"params.yaml: {section}.columns: format {name} has no {standard!r}, only "
                f"{', '.join((*needed, *optional))}"
            )
    for column in needed:
        if column not in present:
            raise StageError(
                f"{where}: no column {own.get(column, column)!r}, which format {name} needs; the "
                f"columns are {names_of(first)}: name yours in {section}.columns: {{{column}: …}}"
            )
    # An optional column may first appear in a later row.
    used = {column: called[column] for column in (*needed, *optional)}
    if "label" not in own and (own or not is_verdict(first.get("label"))):
        # A class, for example.
        used.pop("label", None)
    # Where the first row has a column, or both names of one, the other name means something else.
    others = {
        c: tuple(name for name in _names(c, but=used[c]) if name not in first)
        for c in optional
        if c in _SAME and not own and blank(first.get(used[c]))
    }
    strict = recognized and not own and name == "prompt_completion"
    refused = tuple(column for c in _MEANING for column in _names(c) if strict)
    shape = shape_of(first[used["text"]]) if name == "rendered" else None
    form = Format(name, used, shape, others, refused)
    refuse_lost(form, first, where, section)
    return form


def refuse_lost(form: Format, row: dict, where: str, section: str) -> None:
    """Raise StageError if `row` has a column that `form` must not lose."""
    for column in form.refused:
        if column in row and not blank(row[column]):
            present = {c: name for c in _KNOWN if (name := _name_in(row, c)) in row}
            raise StageError(
                f"{where}: format {form.name} would not use {column!r}; "
                f"{_remedy(present, row, section)}, or name prompt and completion alone to "
                "leave it out"
            )


def _recognized(
    present: dict[str, str], own: dict[str, str], first: dict, where: str, section: str
) -> str:
    for name, (needed, optional) in COLUMNS.items():
        if set(needed) <= present.keys() and own.keys() <= {*needed, *optional}:
            if name == "text" and shape_of(first[present["text"]]):
                return "rendered"
            match turns_of(first.get(present.get("conversations"))):
                case [{"role": _}, *_] if name == "sharegpt":
                    continue
            return name
    raise StageError(
        f"{where}: no known format has the columns {names_of(first)}; "
        f"{_remedy(present, first, section)}"
    )


def _remedy(present: dict[str, str], first: dict, section: str) -> str:
    """The setting of `section`.columns that uses most columns."""
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
        return f"name yours in {section}.columns, such as {{prompt: question, completion: answer}}"
    # Of equally good ones, the first.
    pairs = max(fits, key=lambda pairs: len(set(pairs.values())))
    return f"set {section}.columns: {{" + ", ".join(f"{k}: {v}" for k, v in pairs.items()) + "}"


def _name_in(first: dict, standard: str) -> str:
    """The name of the standard column in this data."""
    return next((name for name in _names(standard) if name in first), standard)


def _names(standard: str, but: str | None = None) -> tuple[str, ...]:
    """The names of the standard column, without `but`."""
    return tuple(name for name in (standard, *_SAME.get(standard, ())) if name != but)
