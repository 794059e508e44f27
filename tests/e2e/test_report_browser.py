"""report.html in headless Chromium: it draws, with a silent console and no request, fits a phone, follows dark mode."""

from __future__ import annotations

import html
import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainwright.monitor.metrics import EvaluationRecord, MetricsWriter, StepRecord, write_summary
from trainwright.monitor.report import write_report

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--hide-scrollbars"),
    *("--virtual-time-budget=5000", "--dump-dom"),
]

# Shows the report in a frame as wide as a phone and tells, in the title, what only a script can see.
FRAME = """<!doctype html><link rel=icon href="data:,">
<iframe id=f src="/report.html" style="width:390px;height:800px;border:0"></iframe><script>
document.getElementById("f").onload = () => {
  const page = document.getElementById("f").contentDocument, view = document.getElementById("f").contentWindow;
  document.title = JSON.stringify({
    width: page.documentElement.clientWidth, content: page.documentElement.scrollWidth,
    wider: [...page.querySelectorAll("main *")].filter(
      (e) => e.getBoundingClientRect().right > 391 && !e.closest("svg")).length,
    curves: [...page.querySelectorAll(".plot")].map((p) => p.querySelectorAll("path.js-line").length),
    page: view.getComputedStyle(page.body).backgroundColor,
    tick: view.getComputedStyle(page.querySelector(".xtick text")).fill,
    line: page.querySelector("#plot-loss path.js-line:last-of-type").style.stroke,
    loaded: view.performance.getEntriesByType("resource").map((r) => r.name),
  });
};
</script>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """The report and the frame behind a local server; the list of paths that were asked for."""
    folder = tmp_path_factory.mktemp("run")
    writer = MetricsWriter(folder)
    for step in range(1, 201):
        writer.step(StepRecord(step, step * 512, step, 4 / step + 1, 1e-3, 0.5, 1.0, 0, 0.1, 5120.0, 0.4, 2**30))
        if step % 50 == 0:
            writer.evaluation(EvaluationRecord(step, 4 / step + 1.1, 1.5))
    writer.close()
    (folder / "config.yaml").write_text(f"run_dir: {'long' * 60}  # override\n")
    sample = "<script>document.title='broken'</script>" + "unbroken" * 60
    write_summary(folder, {"samples": [sample], "data": {"path": "x" * 200}})
    write_report(folder)
    (folder / "frame.html").write_text(FRAME)
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(folder))  # type: ignore[arg-type]

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            asked.append(self.path)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def browse(url: str, profile: Path, *flags: str) -> tuple[str, list[str]]:
    """The page's DOM after its scripts ran, and what it wrote to the console."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def seen_by_script(url: str, profile: Path, *flags: str) -> dict[str, object]:
    dom, said = browse(f"{url}/frame.html", profile, *flags)
    assert not said, said
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title, dom[:2000]
    return dict(json.loads(html.unescape(title[1])))


def test_curves_are_drawn_and_the_console_is_silent(site: tuple[str, list[str]], tmp_path: Path) -> None:
    url, asked = site
    asked.clear()
    dom, said = browse(f"{url}/report.html", tmp_path)
    assert not said, said
    assert len(re.findall(r'class="js-line"', dom)) == 9  # two curves and their raw forms, a curve each for the others
    assert "<title>run" in dom  # the sample's script did not run
    assert asked == ["/report.html"]


def test_fits_a_phone_and_follows_dark_mode(site: tuple[str, list[str]], tmp_path: Path) -> None:
    url, asked = site
    light = seen_by_script(url, tmp_path / "light")
    asked.clear()
    dark = seen_by_script(url, tmp_path / "dark", "--blink-settings=preferredColorScheme=0")
    for view in (light, dark):
        assert view["width"] == view["content"] == 390
        assert view["wider"] == 0
        assert view["curves"] == [3, 1, 1, 1, 2, 1]
        assert view["loaded"] == []
    assert asked == ["/frame.html", "/report.html"]

    def brightness(colour: object) -> int:
        return sum(int(part) for part in re.findall(r"\d+", str(colour))[:3])

    assert brightness(light["page"]) > 700 > 100 > brightness(dark["page"])
    assert brightness(light["tick"]) < brightness(dark["tick"])
    assert light["line"] != dark["line"]
