"""A page as blocks of plain text, rendered as Markdown or as one self-contained HTML file.

All escaping happens here, so that the code that builds blocks cannot forget it: `_md` and `_fence`
in Markdown, the template's environment in HTML.
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
    """Text of a table cell in a fixed-width font: hashes, keys, file names."""


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Table:
    """Rows of text. With `head` empty the first column names the row."""

    head: list[str]
    rows: list[list[str]]

    def numeric(self) -> list[bool]:
        """Which columns contain only numbers; none in a table of facts (no head)."""
        columns = zip(*self.rows, strict=True)
        return [bool(self.head) and all(map(_NUMBER.fullmatch, column)) for column in columns]


@dataclass(frozen=True)
class Chart:
    """`svg` is trusted markup from stages/reporting/charts.py; `alt` describes it."""

    title: str
    alt: str
    svg: str
    table: Table


@dataclass(frozen=True)
class Figures:
    """Headline figures: (name, value, explanation)."""

    items: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Marked:
    """A text in pieces (text, learned); learned pieces are highlighted."""

    pieces: list[tuple[str, bool]]


@dataclass(frozen=True)
class Answers:
    """One prompt and several texts side by side: (who, text)."""

    title: str
    texts: list[tuple[str, str]]


@dataclass(frozen=True)
class Filtered:
    """Answers in at most GROUPS named groups, of which the reader may select one."""

    groups: list[tuple[str, list[Answers]]]


# stages/reporting/page.css has one rule for each.
GROUPS = 4
Block = Paragraph | Table | Chart | Figures | Marked | Answers | Filtered


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]

    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def number(value) -> str:
    """A value for display: integers with commas, others with 4 significant digits."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or value is None:
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    digits = f"{value:.4g}"
    return f"{value:,.0f}" if "e+" in digits else digits


def facts(values: dict) -> Table:
    """A table without a head: keys, as words, and values."""
    return Table([], [[key.replace("_", " "), number(value)] for key, value in values.items()])


def clean(text: str) -> str:
    """`text` with characters that could hide or reorder others replaced by U+FFFD.

    Those are control characters, lone surrogates and bidirectional overrides (Unicode TR36,
    section 3.2); a model may write any of them.
    """
    return _UNSHOWN.sub("\ufffd", text.replace("\r\n", "\n"))


def to_markdown(title: str, sections: list[Section]) -> str:
    """GitHub-flavoured Markdown, with the tables of charts in place of the charts."""
    parts = [f"# {_md(title)}"]
    for section in sections:
        parts.append(f"## {_md(section.title)}")
        parts += [_markdown_block(block) for block in section.blocks]
    return "\n\n".join(part for part in parts if part) + "\n"


def _md(text: str) -> str:
    """`text` escaped for Markdown, on one line."""
    escaped = re.sub(r"([\\`*_{}\[\]<>()#|~$&!])", r"\\\1", _one_line(text))
    # GitHub also links bare URLs, and e-mail addresses even after a backslash.
    escaped = re.sub(r"(?i)(?=://)|(?<=www)(?=\.)", r"\\", escaped)
    return re.sub(r"@(?=\S)", "@\u2060", escaped)


def _md_cell(text: str) -> str:
    # A bar must be written `\|`, so a backslash before a bar cannot be shown in code.
    is_code = isinstance(text, Mono) and text.strip() and "\\|" not in text
    return _code(text) if is_code else _md(text)


def _code(text: str) -> str:
    """`text` as code in a table cell; backticks and bars inside cannot end it."""
    text = _one_line(text).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    ticks, space = "`" * (longest + 1), " " if text[0] == "`" or text[-1] == "`" else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def _one_line(text: str) -> str:
    return " ".join(clean(text).split())


def _fence(text: str) -> str:
    """A code block with a fence longer than any run of backticks in `text`."""
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
    """One HTML file with inline styles and charts, no script, and a CSP that forbids requests."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        # Every value that the template shows passes through here before it is escaped.
        finalize=lambda value: value if hasattr(value, "__html__") else clean(str(value)),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["kind"] = lambda value: type(value).__name__
    css = (HERE / "page.css").read_text(encoding="utf-8")
    page = environment.get_template("page.html.jinja")
    return page.render(title=title, sections=sections, css=css)
