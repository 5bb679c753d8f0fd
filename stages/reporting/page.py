"""A page as plain blocks, written as Markdown or as one HTML file that needs nothing else.

Blocks hold plain text only. Whatever came from data or a model is escaped here, in one place:
the content (stages/reporting/report.py) cannot forget it.
"""

import html
import re
from dataclasses import dataclass, field
from pathlib import Path

CSS = Path(__file__).with_name("page.css")
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
class Section:
    title: str
    blocks: list = field(default_factory=list)


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


def _markdown_block(block) -> str:
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


def to_html(title: str, sections: list[Section]) -> str:
    """One HTML file: styles and charts inside, no script, and a policy that forbids requests."""
    toc = "".join(
        f'<li><a href="#{_anchor(section.title)}">{_html(section.title)}</a></li>'
        for section in sections
    )
    body = "".join(
        f'<section id="{_anchor(section.title)}"><h2>{_html(section.title)}</h2>'
        f"{''.join(map(_html_block, section.blocks))}</section>\n"
        for section in sections
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{_html(title)}</title>
<link rel="icon" href="data:,">
<style>
{CSS.read_text(encoding="utf-8")}</style>
</head>
<body>
<header><h1>{_html(title)}</h1></header>
<nav aria-label="Contents"><ul>{toc}</ul></nav>
<main>
{body}</main>
</body>
</html>
"""


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _html(text: str) -> str:
    return html.escape(clean(text))


def _html_cell(text: str) -> str:
    return f"<code>{_html(text)}</code>" if isinstance(text, Mono) and text else _html(text)


def _html_table(table: Table) -> str:
    """Columns of nothing but numbers are set to the right; facts (no head) never are."""
    numeric = [
        bool(table.head) and all(_NUMBER.fullmatch(cell) for cell in column)
        for column in zip(*table.rows, strict=True)
    ]
    align = [" class=number" if right else "" for right in numeric]
    head = "".join(
        f'<th scope="col"{side}>{_html(cell)}</th>'
        for cell, side in zip(table.head, align, strict=bool(table.head))
    )
    rows = "".join(
        f'<tr><th scope="row"{align[0]}>{_html_cell(row[0])}</th>'
        + "".join(f"<td{s}>{_html_cell(c)}</td>" for c, s in zip(row[1:], align[1:], strict=True))
        + "</tr>"
        for row in table.rows
    )
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'


def _html_block(block) -> str:
    match block:
        case Paragraph():
            return f"<p>{_html(block.text)}</p>"
        case Table():
            return _html_table(block)
        case Figures():
            items = "".join(
                f"<div><dt>{_html(name)}</dt><dd>{_html(value)}</dd><dd>{_html(note)}</dd></div>"
                for name, value, note in block.items
            )
            return f'<dl class="figures">{items}</dl>'
        case Chart():
            return (
                f'<figure><figcaption>{_html(block.title)}</figcaption><div role="img"'
                f' aria-label="{_html(block.alt)}">{block.svg}</div><details><summary>The numbers'
                f"</summary>{_html_table(block.table)}</details></figure>"
            )
        case Marked():
            pieces = "".join(
                f"<mark>{_html(text)}</mark>" if learned else _html(text)
                for text, learned in block.pieces
            )
            return f'<pre dir="auto">{pieces}</pre>'
        case Answers():
            texts = "".join(
                f'<div><h4>{_html(who)}</h4><pre dir="auto">{_html(text)}</pre></div>'
                for who, text in block.texts
            )
            return (
                f'<article><h3>{_html(block.title)}</h3><div class="texts">{texts}</div></article>'
            )
