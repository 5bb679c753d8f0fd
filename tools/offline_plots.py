"""Make the pages of `dvc plots show` and `dvc plots diff` work offline.

    python -m tools.offline_plots

DVC's own page loads Vega from a CDN. This writes the template .dvc/offline_plots.html with Vega
from the package vl-convert-python, and sets it in .dvc/config.local. `make env` runs it once.
"""

import subprocess
from pathlib import Path

import vl_convert

TEMPLATE = Path(".dvc/offline_plots.html")
# DVC's plot templates are written for Vega-Lite 5; this is the last of them.
VEGA_LITE = "5.21"
PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline';
 img-src data: blob:">
{refresh_tag}
<title>DVC plots</title>
<link rel="icon" href="data:,">
<script>(() => {%s})();</script>
<style>body { font-family: system-ui, sans-serif; margin: 1rem; background: #fff; }</style>
</head>
<body>
{plot_divs}
</body>
</html>
"""


def main() -> None:
    bundle = vl_convert.javascript_bundle("globalThis.vegaEmbed = vegaEmbed;", VEGA_LITE)
    TEMPLATE.write_text(PAGE % bundle, encoding="utf-8")
    command = ["dvc", "config", "--local", "plots.html_template", TEMPLATE.name]
    subprocess.run(command, check=True)
    print(f"dvc plots writes pages that open offline ({TEMPLATE}, set in .dvc/config.local)")


if __name__ == "__main__":
    main()
