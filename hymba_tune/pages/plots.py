"""Plots as SVG inside a page: sharp at any size, their text real text, their colors the page's."""

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
"""Comes with matplotlib, and is wider than what a browser will take instead, so that room is left for that."""
SIZE = (4.3, 2.7)
"""Inches. As wide as a phone, so that text stays readable there; wide pages set several side by side."""
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
    """A plot and the words around it.

    Attributes:
        title: What it shows.
        alt: What it says, for those who do not see it.
        svg: The drawing.
        note: A line below it.
    """

    title: str
    alt: str
    svg: Markup
    note: str = ""


def plot(
    title: str, alt: str, draw: Callable[[Axes], None], *, size: tuple[float, float] = SIZE, note: str = ""
) -> Plot:
    """Draw a plot in the look of all pages.

    Args:
        title: What it shows; the page prints it above.
        alt: What it says in a sentence.
        draw: Draws on the axes it is given, in colors of `LIGHT`, and labels them with units.
        size: Inches.
        note: A line below it.
    """
    salt = hashlib.sha256(title.encode()).hexdigest()
    drawn = _drawn(draw, size, format="svg", transparent=True, metadata={"Date": None, "Creator": None}, salt=salt)
    return Plot(title, alt, Markup(_of_the_page(drawn.decode())), note)


def picture(draw: Callable[[Axes], None], *, size: tuple[float, float] = SIZE) -> bytes:
    """Draw a plot as a PNG on white, for where a page of ours is not.

    Args:
        draw: As `plot` takes it.
        size: Inches.
    """
    return _drawn(draw, size, format="png", dpi=PIXELS_AN_INCH, metadata={"Software": None}, salt=None)


def _drawn(draw: Callable[[Axes], None], size: tuple[float, float], *, salt: str | None, **how: Any) -> bytes:
    look: Any = {**STYLE, "svg.hashsalt": salt}
    with mpl.rc_context(look), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # the browser's fonts have it
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        drawn = BytesIO()
        figure.savefig(drawn, **how)
    return drawn.getvalue()


def _of_the_page(svg: str) -> str:
    """The ``svg`` element alone, its colors and fonts those of the page, without names that other plots have too."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"<svg .*?(viewBox=\"[^\"]*\").*?>", r'<svg \1 aria-hidden="true">', svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace(f"'{FONT}'", "var(--sans)").replace("xlink:href", "href")
    for name, color in LIGHT.items():
        svg = svg.replace(color, f"var(--{name})")
    return svg
