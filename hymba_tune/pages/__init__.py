"""Pages that people read: one look, one file each, nothing fetched from anywhere."""

from hymba_tune.pages.numbers import duration, gigabytes, share
from hymba_tune.pages.page import render
from hymba_tune.pages.plots import SIZE, Plot, picture, plot
from hymba_tune.pages.theme import LIGHT

__all__ = ["LIGHT", "SIZE", "Plot", "duration", "gigabytes", "picture", "plot", "render", "share"]
