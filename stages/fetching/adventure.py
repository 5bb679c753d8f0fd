"""The texts of the package adventure: a game of 1977 that describes a cave in English sentences.

Its data file is read as text; no module of the package is imported. Sections of numbered lines
end with a line -1; the first describes places at length, the sixth is what the game says.
"""

import re
from pathlib import Path

PLACES, MESSAGES = 1, 6


def adventure_texts(data: Path) -> list[dict]:
    """Rows {row, text} of the two sections in their order, in upper and lower case."""
    rows: dict[tuple[int, str], list[str]] = {}
    section, begins = 0, True
    for line in data.read_text(encoding="ascii").splitlines():
        number, _, text = line.partition("\t")
        if begins:
            section, begins = int(number), False
        elif number == "-1":
            begins = True
        elif section in (PLACES, MESSAGES):
            rows.setdefault((section, number), []).append(text)
    return [
        {"row": f"{data.name}:{section}.{number}", "text": _sentences(" ".join(lines))}
        for (section, number), lines in rows.items()
    ]


def _sentences(text: str) -> str:
    """Capitals only where a sentence begins, and for I: the game was written in capitals."""
    text = " ".join(text.split()).lower()
    text = re.sub(r"(^|[.!?]\"? +\"?|^\")([a-z])", lambda m: m[1] + m[2].upper(), text)
    return re.sub(r"\bi\b", "I", text)
