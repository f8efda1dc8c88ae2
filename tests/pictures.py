"""Draws the README's pictures from a real run of the demo: its terminal as SVG, and the top of its report as WebP.

    python -m tests.pictures

The run takes minutes on two cores; ``--run RUN`` draws the report of an earlier one again. It needs Chromium.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from contextlib import chdir, suppress
from io import StringIO
from pathlib import Path
from unittest.mock import patch

from PIL import Image

from hymba_tune.cli.main import main
from hymba_tune.cli.screen import console
from tests.browser import find, launched
from tests.conftest import ROOT

IMAGES = ROOT / "docs" / "images"
TERMINAL, REPORT = "run.svg", "report.webp"
COMMAND = ["sft", "--config", "demo"]
RUN = Path("runs", "demo")
COLUMNS = 80
WIDTH, HEIGHT = 1200, 1225
"""Size of the report's picture in pixels: its verdict, its answers and the first curves."""
MOST_BYTES = 150_000
"""The most bytes of a picture."""


def draw_terminal(folder: Path) -> str:
    """Run the demo in a folder, and return what its terminal shows as SVG without fonts from the network."""
    # Without a terminal no spinner is recorded, and with this patch nothing is said of what took seconds.
    console.record, console.file, console.width = True, StringIO(), COLUMNS
    with patch("hymba_tune.cli.screen.QUIET_SECONDS", 1e9), chdir(folder), suppress(SystemExit):
        main([*COMMAND, "--out", str(RUN)])
    console.file = sys.stdout
    return lighten(console.export_svg(title=" ".join(["hymba-tune", *COMMAND]), unique_id="run"))


def lighten(svg: str) -> str:
    """Remove fonts from the network and what clips lines that fit anyway, and add a title."""
    for part in (
        r"@font-face \{.*?\}",
        r"<clipPath id=\"run-line-.*?</clipPath>",
        r" clip-path=\"url\(#run-line-\d+\)\"",
    ):
        svg = re.sub(part, "", svg, flags=re.DOTALL)
    svg = re.sub(r"\n\s*", "\n", svg).replace("Fira Code, ", "").replace("&#160;", "\N{NO-BREAK SPACE}")
    return svg.replace(">", f"><title>The terminal of {' '.join(['hymba-tune', *COMMAND])}</title>", 1)


def draw_report(run: Path, picture: Path) -> None:
    """Draw the top of a run's report."""
    program = find()
    assert program, "the report is drawn by Chromium, which is not installed"
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        launched(program, Path(profile)) as browser,
    ):
        png = Path(profile, "page.png")
        browser.look(run / "report.html", WIDTH, picture=png)
        with Image.open(png) as page:
            page.crop((0, 0, WIDTH, min(HEIGHT, page.height))).convert("RGB").save(picture, quality=85, method=6)


def draw() -> None:
    """Draw the pictures into ``docs/images``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="the directory of an earlier run of the demo")
    run = parser.parse_args().run
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        if run is None:
            (IMAGES / TERMINAL).write_text(draw_terminal(Path(folder)), encoding="utf-8")
            run = Path(folder) / RUN
        draw_report(run, IMAGES / REPORT)
    for name in (TERMINAL, REPORT):
        size = (IMAGES / name).stat().st_size
        assert size < MOST_BYTES, f"{name} has {size:,} bytes"
        console.print(f"{IMAGES / name}  {size:,} bytes", markup=False)


if __name__ == "__main__":
    draw()
