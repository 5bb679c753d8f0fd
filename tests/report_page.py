"""Reads a report as a browser would: its text, and the points of its charts off their geometry."""

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

from stages.reporting.charts import HEIGHT, WIDTH

SVG = "{http://www.w3.org/2000/svg}"


class Page(HTMLParser):
    """Tags with their attributes, ids, and the text of each <pre>, in order."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self._in_pre = False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "pre":
            self._in_pre = True
            self.texts.append("")

    def handle_endtag(self, tag):
        if tag == "pre":
            self._in_pre = False

    def handle_data(self, data):
        if self._in_pre:
            self.texts[-1] += data


def figures(html: str) -> dict[str, tuple[ET.Element, list[list[str]]]]:
    """Title of each chart -> its SVG, and the rows of the table behind it."""
    found = {}
    for figure in re.findall(r"<figure>.*?</figure>", html, re.DOTALL):
        title = re.search(r"<figcaption>(.*?)</figcaption>", figure)[1]
        svg = ET.fromstring(re.search(r"<svg.*?</svg>", figure, re.DOTALL)[0])
        body = re.search(r"<tbody>(.*)</tbody>", figure, re.DOTALL)[1]
        rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in body.split("</tr>")[:-1]]
        found[title] = svg, rows
    return found


def axis(svg: ET.Element, which: str) -> tuple[float, float]:
    """First and last value of the `X` or `Y` axis."""
    for element in svg.iter():
        label = element.get("aria-label", "")
        if label.startswith(f"{which}-axis titled"):
            ends = re.search(r"values from (\S+) to (\S+)", label).groups()
            return tuple(float(end.replace(",", "")) for end in ends)
    raise AssertionError(f"no {which} axis")


def marks(svg: ET.Element, kind: str) -> list[ET.Element]:
    """The drawn elements of one kind: line, symbol, rect or rule."""
    return [
        mark
        for group in svg.iter(f"{SVG}g")
        if group.get("class", "").startswith(f"mark-{kind} role-mark")
        for mark in group
    ]


def line_points(svg: ET.Element, line: ET.Element) -> list[tuple[float, float]]:
    """(x, y) in the units of the axes, from where the path runs."""
    corners = re.findall(r"[ML]([-\d.e]+),([-\d.e]+)", line.get("d"))
    (x0, x1), (y0, y1) = axis(svg, "X"), axis(svg, "Y")
    return [
        (x0 + float(x) / WIDTH * (x1 - x0), y1 - float(y) / HEIGHT * (y1 - y0)) for x, y in corners
    ]
