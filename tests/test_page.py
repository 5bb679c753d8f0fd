"""Any text appears in Markdown as itself, in its own cell."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from stages.reporting.page import Mono, Paragraph, Section, Table, clean, to_markdown

MARKS = [
    "`",
    "``",
    "|",
    "\\",
    "\n",
    "# ",
    "[x](y)",
    "<b>",
    "![",
    "_",
    "*",
    "~~",
    "$",
    "&lt;",
    "a",
    " ",
]


def parsed(*blocks):
    text = to_markdown("Title", [Section("Section", list(blocks))])
    return text, MarkdownIt("commonmark").enable("table").parse(text)


@given(st.lists(st.sampled_from(MARKS), max_size=8).map("".join))
def test_any_text_stays_in_its_cell(text):
    said, tokens = parsed(Table(["first", "second"], [[Mono(text), text]]), Paragraph(f"x{text}"))
    kinds = [token.type for token in tokens]
    counts = [kinds.count(f"{kind}_open") for kind in ("heading", "tr", "td", "paragraph")]
    assert counts == [2, 2, 2, 1], said
    code, plain, paragraph = [token.children for token in tokens if token.type == "inline"][-3:]
    shown = " ".join(clean(text).split())
    assert {child.type for child in code} <= {"text" if "\\|" in text else "code_inline"}, said
    assert {child.type for child in plain + paragraph} <= {"text"}, said
    assert ["".join(child.content for child in cell) for cell in (code, plain)] == [shown] * 2


@pytest.mark.parametrize(
    ("text", "markdown"),
    [
        ("see https://a.example/x", r"see https\://a.example/x"),
        ("www.a.example", r"www\.a.example"),
        ("WWW.a.example", r"WWW\.a.example"),
        ("me@a.example", "me@\u2060a.example"),
    ],
)
def test_github_makes_no_link_of_a_bare_address(text, markdown):
    said, _ = parsed(Paragraph(text), Table([], [[Mono(text), text]]))
    assert f"\n\n{markdown}\n\n" in said
    assert f"| `{text}` | {markdown} |" in said
