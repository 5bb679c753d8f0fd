"""English prose from the package adventure, a text game of 1977.

Its data file is read as text; no module of the package is imported. The file has sections of
numbered lines, each closed by a line -1: section 1 describes places, section 6 has messages.
"""

import re
from pathlib import Path

PLACES, MESSAGES = 1, 6


def adventure_texts(data: Path) -> list[dict]:
    """Rows {row, text} of both sections in file order, in sentence case."""
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
    """Sentence case for text that the game has in capitals."""
    text = " ".join(text.split()).lower()
    text = re.sub(r"(^|[.!?]\"? +\"?|^\")([a-z])", lambda m: m[1] + m[2].upper(), text)
    return re.sub(r"\bi\b", "I", text)
