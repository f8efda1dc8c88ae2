"""Plots as SVG for pages, with real text and the page's colors, and as PNG."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hymba_tune.pages.theme import LIGHT

FONT = "DejaVu Sans"
"""The font that layouts are computed with. It comes with matplotlib and is wider than the fonts of browsers, so that
text fits there as well."""
SIZE = (4.3, 2.7)
"""Width and height in inches. As wide as a phone, so that text is readable there; wide pages show several in a row."""
PIXELS_AN_INCH = 160
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": FONT,
    "font.size": 9,
    "text.color": LIGHT["ink"],
    "text.parse_math": False,
    "axes.labelcolor": LIGHT["dim"],
    "axes.edgecolor": LIGHT["rule"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": LIGHT["rule"],
    "grid.linewidth": 0.6,
    "xtick.color": LIGHT["dim"],
    "ytick.color": LIGHT["dim"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.labelcolor": LIGHT["ink"],
}


@dataclass(frozen=True)
class Plot:
    """A plot with its texts.

    Attributes:
        title: Title of the plot.
        alt: A sentence that replaces the plot for readers who do not see it.
        svg: The plot as an ``svg`` element.
        note: A line below the plot; may be empty.
    """

    title: str
    alt: str
    svg: Markup
    note: str = ""


def plot(
    title: str, alt: str, draw: Callable[[Axes], None], *, size: tuple[float, float] = SIZE, note: str = ""
) -> Plot:
    """Draw a plot in the style of the pages.

    Args:
        title: Title of the plot; the page prints it above.
        alt: A sentence that replaces the plot for readers who do not see it.
        draw: Draws on the axes in colors of `LIGHT`, and labels them with units.
        size: Width and height in inches.
        note: A line below the plot.
    """
    salt = hashlib.sha256(title.encode()).hexdigest()
    svg = _draw(draw, size, format="svg", transparent=True, metadata={"Date": None, "Creator": None}, salt=salt)
    return Plot(title, alt, Markup(_embeddable(svg.decode())), note)


def picture(draw: Callable[[Axes], None], *, size: tuple[float, float] = SIZE) -> bytes:
    """Draw a plot as a PNG on white, for use outside of pages.

    Args:
        draw: Draws on the axes, as for `plot`.
        size: Width and height in inches.
    """
    return _draw(draw, size, format="png", dpi=PIXELS_AN_INCH, metadata={"Software": None}, salt=None)


def _draw(draw: Callable[[Axes], None], size: tuple[float, float], *, salt: str | None, **options: Any) -> bytes:
    # Without a fixed salt, matplotlib gives elements random ids and the same plot differs between runs.
    style: Any = {**STYLE, "svg.hashsalt": salt}
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # the browser's fonts have it
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        buffer = BytesIO()
        figure.savefig(buffer, **options)
    return buffer.getvalue()


def _embeddable(svg: str) -> str:
    """Reduce a document to its ``svg`` element, with the page's colors and font and without ids of other plots."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"<svg .*?(viewBox=\"[^\"]*\").*?>", r'<svg \1 aria-hidden="true">', svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace(f"'{FONT}'", "var(--sans)").replace("xlink:href", "href")
    for name, color in LIGHT.items():
        svg = svg.replace(color, f"var(--{name})")
    return svg
