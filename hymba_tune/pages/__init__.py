"""HTML pages with a common style: one file each, which fetches nothing."""

from hymba_tune.pages.page import render
from hymba_tune.pages.plots import SIZE, Plot, picture, plot
from hymba_tune.pages.theme import LIGHT

__all__ = ["LIGHT", "SIZE", "Plot", "picture", "plot", "render"]
