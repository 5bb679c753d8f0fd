"""`python -m tests.chaos`, which is `make chaos`: see everything.py."""

import sys
from pathlib import Path

# The processes that are killed import this module too, and must not get stages/ from here.
if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    from everything import main

    main()
