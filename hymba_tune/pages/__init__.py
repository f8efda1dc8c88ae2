"""Pages that people read: one look, one file each, nothing fetched from anywhere."""

from hymba_tune.pages.page import render
from hymba_tune.pages.plots import SIZE, Plot, picture, plot
from hymba_tune.pages.theme import LIGHT

__all__ = ["LIGHT", "SIZE", "Plot", "picture", "plot", "render"]
