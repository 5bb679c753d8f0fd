"""Opens the report and the pages of `dvc plots` in headless Chromium that can reach nothing.

    make test-browser

Chromium's only way out is a proxy of ours that answers nothing and writes down who was asked for.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import threading

import pytest
from export_inputs import HOSTILE
from test_export import make_inputs, run_export
from tiny import ROOT

WIDTHS = (390, 1280)
# Runs in a page around the report: measures each frame and leaves JSON in the title.
HARNESS = """<!doctype html><body>%s<script>
const contrast = (a, b) => {
  const light = (c) => {
    const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const [x, y] = [light(a), light(b)];
  return (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
};
const measure = (frame) => {
  const doc = frame.contentDocument, view = frame.contentWindow;
  const paper = view.getComputedStyle(doc.body).backgroundColor;
  const texts = [...doc.querySelectorAll("main p, main td, main th, dd, dt, h4, summary, a")];
  const drawn = [...doc.querySelectorAll("svg [class*=role-mark] > path")];
  const words = [...doc.querySelectorAll("svg text")].filter((t) => t.textContent);
  const boxes = words.map((t) => t.getBoundingClientRect());
  const colour = (e) => {
    const s = view.getComputedStyle(e);
    return s.fill === "none" ? s.stroke : s.fill;
  };
  return {
    width: view.innerWidth,
    scroll: doc.documentElement.scrollWidth,
    paper,
    scripts: doc.scripts.length,
    charts: doc.querySelectorAll("figure svg").length,
    texts: texts.length,
    lowest: Math.min(...texts.map((t) => contrast(view.getComputedStyle(t).color, paper))),
    drawn: drawn.length,
    faintest: Math.min(...drawn.map((d) => contrast(colour(d), paper))),
    words: words.length,
    smallest: Math.min(...boxes.map((b) => Math.min(b.width, b.height))),
    left: Math.min(...boxes.map((b) => b.left)),
    right: Math.max(...boxes.map((b) => b.right)),
  };
};
addEventListener("load", () => {
  document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(measure));
});
</script>"""


# Chromium calls home whatever the flags; nothing of ours names such a host.
OWN_CALLS = re.compile(r"\w+ (https?://)?[\w.-]+\.(google|googleapis|gvt1)\.com\b")


class Proxy:
    """Takes every connection on a local port, notes the first line it was sent, and hangs up."""

    def __init__(self):
        self.asked: list[str] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                line = connection.recv(4096).split(b"\r\n")[0].decode("latin-1")
                if not OWN_CALLS.match(line):
                    self.asked.append(line)

    def close(self):
        self._socket.close()


@pytest.fixture
def proxy():
    proxy = Proxy()
    yield proxy
    proxy.close()


def chromium(proxy: Proxy, profile, url: str, *options: str) -> str:
    """The DOM of `url` once it has loaded, with the network denied."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    assert program, "no chromium: apt-get install chromium"
    command = [
        program,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        "--allow-file-access-from-files",
        f"--user-data-dir={profile}",
        f"--proxy-server=127.0.0.1:{proxy.port}",
        "--proxy-bypass-list=<-loopback>",
        "--virtual-time-budget=20000",
        *options,
    ]
    done = subprocess.run(
        [*command, "--dump-dom", url], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = make_inputs(tmp_path_factory.mktemp("browser") / "ws", HOSTILE)
    assert run_export(folder).returncode == 0
    return folder


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_fits_and_can_be_read(workspace, proxy, tmp_path, scheme):
    report = (workspace / "metrics/report.html").as_uri()
    frames = [f'<iframe src="{report}" width={w} height=900 style="border:0">' for w in WIDTHS]
    harness = tmp_path / "harness.html"
    harness.write_text(HARNESS % "".join(f"{frame}</iframe>" for frame in frames))
    option = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    dom = chromium(proxy, tmp_path / "profile", harness.as_uri(), option)
    measured = json.loads(dom.split("<title>")[1].split("</title>")[0])
    assert proxy.asked == []
    assert [page["width"] for page in measured] == [*WIDTHS]
    for page in measured:
        assert page["scroll"] <= page["width"], "the page scrolls sideways"
        assert (page["paper"] == "rgb(255, 255, 255)") == (scheme == "light")
        assert page["scripts"] == 0
        assert page["charts"] == 5
        assert page["texts"] > 100
        # WCAG 2.1, 1.4.3 and 1.4.11.
        assert page["lowest"] >= 4.5
        assert page["drawn"] > 30
        assert page["faintest"] >= 3
        assert page["words"] > 40
        assert page["smallest"] >= 6
        assert page["left"] >= 0
        assert page["right"] <= page["width"]


def test_report_prints(workspace, proxy, tmp_path):
    file = tmp_path / "report.pdf"
    report = (workspace / "metrics/report.html").as_uri()
    chromium(proxy, tmp_path / "profile", report, f"--print-to-pdf={file}")
    pages = file.read_bytes().count(b"/Type /Page\n")
    assert 2 <= pages <= 14
    assert proxy.asked == []


@pytest.fixture(scope="module")
def plots(workspace):
    """The workspace as a DVC repository with our page for plots."""
    (workspace / "tools").symlink_to(ROOT / "tools")
    shutil.copytree(ROOT / ".dvc/plots", workspace / ".dvc/plots")
    (workspace / ".gitignore").write_text("/models\n/data\n/tools\n/stages\n")
    shutil.copy(ROOT / "metrics/rows.csv", workspace / "metrics/rows.csv")
    for command in ("git init -q", "dvc init -q -f", "python -m tools.offline_plots"):
        subprocess.run(command.split(), cwd=workspace, check=True, env=os.environ)
    shutil.copytree(ROOT / ".dvc/plots", workspace / ".dvc/plots", dirs_exist_ok=True)
    for command in ("git add -A", "git commit -qm run"):
        subprocess.run(command.split(), cwd=workspace, check=True)
    return workspace


@pytest.mark.parametrize("command", ["show", "diff HEAD"])
def test_plots_are_drawn_without_a_network(plots, proxy, tmp_path, command):
    subprocess.run(["dvc", "plots", *command.split(), "-o", tmp_path], cwd=plots, check=True)
    dom = chromium(proxy, tmp_path / "profile", (tmp_path / "index.html").as_uri())
    assert proxy.asked == []
    assert dom.count('class="marks"') == 5
    for title in (
        "Loss (mean NLL per learned token)",
        "Learning rate",
        "Rows by length in tokens",
        "NLL of each scored row",
    ):
        assert title in dom


def test_the_proxy_notices_a_page_that_needs_the_network(plots, proxy, tmp_path):
    """DVC's own page does: were nothing noted here, the tests above could not fail."""
    subprocess.run(["dvc", "config", "--local", "-u", "plots.html_template"], cwd=plots, check=True)
    subprocess.run(["dvc", "plots", "show", "-o", tmp_path], cwd=plots, check=True)
    dom = chromium(proxy, tmp_path / "profile", (tmp_path / "index.html").as_uri())
    assert any("cdn.jsdelivr.net" in line for line in proxy.asked)
    assert 'class="marks"' not in dom
