"""How the tools speak: text from files stays on its line, and a fault is one line."""

import sys
from typing import NoReturn


class ToolError(Exception):
    """A fault the user can mend. Its message is one line: what is wrong, where, what to do."""


def printable(text: str) -> str:
    r"""`text` with what would end its line or steer a terminal as escapes, such as \x1b."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def cut(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def fail(tool: str, message: str) -> NoReturn:
    """End with status 2, which says that nothing could be judged, and one line."""
    print(f"{tool}: {printable(message)}", file=sys.stderr)
    sys.exit(2)
