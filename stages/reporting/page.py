"""A page as plain blocks, written as Markdown or as one HTML file that needs nothing else.

Blocks hold plain text only. Whatever came from data or a model is escaped here: by `_md` and
`_fence` in Markdown, by the template's environment in HTML. The content cannot forget it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

HERE = Path(__file__).parent
_NUMBER = re.compile(r"([+-]?[\d,]+(\.\d+)?(e-\d+)?( ?%)?)?")
_UNSHOWN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Mono(str):
    """Text of a table cell that is shown in a fixed-width font: hashes, keys, file names."""


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Table:
    """Rows of text. With `head` empty the first column names the row."""

    head: list[str]
    rows: list[list[str]]

    def numeric(self) -> list[bool]:
        """Which columns are nothing but numbers; facts (no head) never are."""
        columns = zip(*self.rows, strict=True)
        return [bool(self.head) and all(map(_NUMBER.fullmatch, column)) for column in columns]


@dataclass(frozen=True)
class Chart:
    """`svg` is trusted markup by stages/reporting/charts.py; `alt` says what it shows in words."""

    title: str
    alt: str
    svg: str
    table: Table


@dataclass(frozen=True)
class Figures:
    """The numbers a reader wants first: (name, value, what it means)."""

    items: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Marked:
    """A text in pieces; those with True were learned and are marked."""

    pieces: list[tuple[str, bool]]


@dataclass(frozen=True)
class Answers:
    """One prompt and several texts side by side: (who, text)."""

    title: str
    texts: list[tuple[str, str]]


@dataclass(frozen=True)
class Filtered:
    """Answers in groups by name, of which a reader may choose one; at most GROUPS of them."""

    groups: list[tuple[str, list[Answers]]]


# As many as stages/reporting/page.css has rules for.
GROUPS = 4
Block = Paragraph | Table | Chart | Figures | Marked | Answers | Filtered


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]

    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def number(value) -> str:
    """A value as a person reads it: whole numbers with commas, others with 4 digits."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or value is None:
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    digits = f"{value:.4g}"
    return f"{value:,.0f}" if "e+" in digits else digits


def facts(values: dict) -> Table:
    """A table without a head: keys as words, and their values."""
    return Table([], [[key.replace("_", " "), number(value)] for key, value in values.items()])


def clean(text: str) -> str:
    """`text` with every character that would hide or reorder its neighbours as U+FFFD.

    Those are control characters, lone surrogates and the marks that override the direction of
    writing (Unicode TR36, section 3.2): a model can write any of them.
    """
    return _UNSHOWN.sub("\ufffd", text.replace("\r\n", "\n"))


def to_markdown(title: str, sections: list[Section]) -> str:
    """GitHub-flavoured Markdown; charts are left to the HTML page, their tables stay."""
    parts = [f"# {_md(title)}"]
    for section in sections:
        parts.append(f"## {_md(section.title)}")
        parts += [_markdown_block(block) for block in section.blocks]
    return "\n\n".join(part for part in parts if part) + "\n"


def _md(text: str) -> str:
    """`text` as Markdown that shows exactly it, on one line."""
    escaped = re.sub(r"([\\`*_{}\[\]<>()#|~$&!])", r"\\\1", _one_line(text))
    # GitHub makes links of bare addresses too; those of mail it finds behind a backslash as well.
    escaped = re.sub(r"(?i)(?=://)|(?<=www)(?=\.)", r"\\", escaped)
    return re.sub(r"@(?=\S)", "@\u2060", escaped)


def _md_cell(text: str) -> str:
    # A bar is written `\|`, which leaves no way to write a backslash before one in code.
    is_code = isinstance(text, Mono) and text.strip() and "\\|" not in text
    return _code(text) if is_code else _md(text)


def _code(text: str) -> str:
    """`text` in a table cell as code, which no backtick and no bar inside can end."""
    text = _one_line(text).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    ticks, space = "`" * (longest + 1), " " if text[0] == "`" or text[-1] == "`" else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def _one_line(text: str) -> str:
    return " ".join(clean(text).split())


def _fence(text: str) -> str:
    """A code block that no run of backticks inside can end."""
    text = clean(text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}text\n{text}\n{ticks}"


def _markdown_block(block: Block) -> str:
    match block:
        case Paragraph():
            return _md(block.text)
        case Figures():
            return _markdown_block(Table(["", "", ""], [list(item) for item in block.items]))
        case Table():
            width = len(block.rows[0]) if block.rows else len(block.head)
            lines = [block.head or [""] * width, ["---"] * width]
            lines[0] = [_md(cell) for cell in lines[0]]
            lines += [[_md_cell(cell) for cell in row] for row in block.rows]
            return "\n".join(f"| {' | '.join(line)} |" for line in lines)
        case Chart():
            return f"{_md(block.title)}. {_md(block.alt)}"
        case Marked():
            return "\n\n".join(
                f"{'Learned' if learned else 'Not learned'}:\n\n{_fence(text)}"
                for text, learned in block.pieces
            )
        case Answers():
            texts = "\n\n".join(f"{_md(who)}:\n\n{_fence(text)}" for who, text in block.texts)
            return f"### {_md(block.title)}\n\n{texts}"
        case Filtered():
            return "\n\n".join(
                part
                for name, answers in block.groups
                for part in (f"{_md(name)} ({len(answers)}):", *map(_markdown_block, answers))
            )


def to_html(title: str, sections: list[Section]) -> str:
    """One HTML file: styles and charts inside, no script, and a policy that forbids requests."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        # Whatever a template shows passes here before it is escaped, but markup of its own.
        finalize=lambda value: value if hasattr(value, "__html__") else clean(str(value)),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["kind"] = lambda value: type(value).__name__
    css = (HERE / "page.css").read_text(encoding="utf-8")
    page = environment.get_template("page.html.jinja")
    return page.render(title=title, sections=sections, css=css)
