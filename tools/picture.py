"""Draw the pictures of README.md and docs/.

    python -m tools.picture report     docs/report.png: the top of metrics/report.html
    python -m tools.picture memory     docs/memory.svg: what plan prints for a 7B recipe

`report` needs Chromium. `memory` needs no weights and no GPU: it takes the shape of Mistral-7B and
rows of random lengths, distributed like those of the recipe's data set.
"""

import argparse
import html
import math
import random
import shutil
import subprocess
import tempfile
from pathlib import Path

import yaml

from tools.screen import fail

REPORT = Path("metrics/report.html")
REPORT_PICTURE = Path("docs/report.png")
MEMORY_PICTURE = Path("docs/memory.svg")
RECIPE = Path("recipes/mistral-7b-fast.yaml")
ROWS = 1000
# Of the log-normal lengths of rows in tokens, as in benchmarks/speed.py.
MEDIAN, SIGMA, SHORTEST = 380, 0.75, 16
WIDTH, HEIGHT = 1280, 1610
LIGHT = 1
# Of the memory table, in pixels. Browsers scale a line of text to `textLength`.
FONT, CHARACTER, LINE, MARGIN = 13, 7.8, 19, 16
STYLE = """\
text { font: 13px ui-monospace, Menlo, Consolas, monospace; fill: #1f2328; white-space: pre }
rect { fill: #f6f8fa }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } rect { fill: #151b23 } }"""


def report() -> None:
    """Write REPORT_PICTURE with headless Chromium."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not program:
        fail("picture", "no chromium; install it: apt-get install chromium")
    if not REPORT.exists():
        fail("picture", f"no {REPORT}; make it: dvc repro")
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
            f"--screenshot={REPORT_PICTURE.resolve()}",
            REPORT.resolve().as_uri(),
        ]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    print(f"picture: wrote {REPORT_PICTURE}, {REPORT_PICTURE.stat().st_size / 1e3:.0f} KB")


def memory_text() -> str:
    """The tables that plan prints for RECIPE, which are the same on every machine."""
    from transformers import MistralConfig

    from stages import plan
    from stages.planning.advice import planned
    from stages.planning.scoring import scoring_stages
    from stages.shared import placement
    from stages.shared.params import Params
    from stages.shared.vram import sizes_of
    from stages.shared.workload import KEPT, Lengths, shape_of

    params = Params.model_validate(yaml.safe_load(RECIPE.read_text(encoding="utf-8")))
    most = params.prepare.max_length
    draw = random.Random(0)
    lengths = (draw.lognormvariate(math.log(MEDIAN), SIGMA) for _ in range(ROWS))
    tokens = [min(most, max(SHORTEST, int(length))) for length in lengths]
    config = MistralConfig()  # its defaults are those of Mistral-7B
    shape = shape_of(config)
    run = planned(config, shape, params, Lengths(tokens, tokens, most))
    sizes = sizes_of(shape, run)
    placed = placement.resident(sizes, KEPT[params.train.gradient_checkpointing])
    others = scoring_stages(shape, run, max(tokens))
    cards = plan.metrics(shape, run, sizes, params, others)["cards"]
    return "\n".join(
        [
            f"{RECIPE.stem}, {ROWS:,} rows, all weights on the card:",
            plan.table(placement.predict(sizes, placed), run, shape, placed),
            "what fits on which card:",
            plan.cards_table(cards, shape.layers),
        ]
    )


def drawn(text: str) -> str:
    """`text` as an SVG in a fixed-width font, for light and dark pages."""
    lines = text.split("\n")
    width = 2 * MARGIN + CHARACTER * max(map(len, lines))
    height = 2 * MARGIN + LINE * len(lines)
    body = "\n".join(
        f'<text x="{MARGIN}" y="{MARGIN + FONT + LINE * i}" xml:space="preserve" '
        f'textLength="{CHARACTER * len(line):.1f}">{html.escape(line)}</text>'
        for i, line in enumerate(lines)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" '
        f'width="{width:.0f}" height="{height}" role="img">\n'
        f"<title>{html.escape(lines[0])}</title>\n<style>{STYLE}</style>\n"
        f'<rect width="100%" height="100%" rx="6"/>\n{body}\n</svg>\n'
    )


def memory() -> None:
    """Write MEMORY_PICTURE."""
    MEMORY_PICTURE.write_text(drawn(memory_text()), encoding="utf-8")
    print(f"picture: wrote {MEMORY_PICTURE}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.picture", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("which", choices=["report", "memory"])
    {"report": report, "memory": memory}[parser.parse_args().which]()


if __name__ == "__main__":
    main()
