"""How the tools speak: text from files stays on its line, and a fault is one line."""

import sys
from typing import NoReturn

from stages.shared.screen import on_screen


def fail(tool: str, fault: object) -> NoReturn:
    """End with status 2, which says that nothing could be judged, and one line."""
    print(on_screen(f"{tool}: {fault}"), file=sys.stderr)
    sys.exit(2)
