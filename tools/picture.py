"""Take the picture of the report that the README shows.

    python -m tools.picture

Opens metrics/report.html in headless Chromium and writes its top, 1280 pixels wide, to
docs/report.png.
"""

import shutil
import subprocess
import tempfile
from pathlib import Path

from tools.screen import fail

REPORT = Path("metrics/report.html")
PICTURE = Path("docs/report.png")
WIDTH, HEIGHT = 1280, 1610
LIGHT = 1


def main() -> None:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not program:
        fail("picture", "no chromium; install it: apt-get install chromium")
    if not REPORT.exists():
        fail("picture", f"no {REPORT}; make it: dvc repro")
    PICTURE.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        command = [
            program,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
            f"--blink-settings=preferredColorScheme={LIGHT}",
            f"--window-size={WIDTH},{HEIGHT}",
            f"--screenshot={PICTURE.resolve()}",
            REPORT.resolve().as_uri(),
        ]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    print(f"picture: {PICTURE}, {PICTURE.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
