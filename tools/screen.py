"""Output of the tools: escaped text, and errors in one line."""

import sys
from typing import NoReturn

from stages.shared.screen import on_screen


def fail(tool: str, fault: object) -> NoReturn:
    """Exit with status 2 and one line."""
    print(on_screen(f"{tool}: {fault}"), file=sys.stderr)
    sys.exit(2)
