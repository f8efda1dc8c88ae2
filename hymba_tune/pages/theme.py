"""The colors of pages and plots. Lines of a plot also differ in dashes or markers, so that gray print loses nothing."""

from __future__ import annotations

LIGHT = {
    "ink": "#17212b",
    "dim": "#5a6775",
    "rule": "#dde3ea",
    "paper": "#fbfcfd",
    "panel": "#f1f4f7",
    "first": "#1764a8",
    "second": "#b4490b",
    "third": "#5b3f9c",
    "fourth": "#22763e",
    "good": "#1d7a43",
    "bad": "#b3261e",
}
"""Colors by purpose. Plots are drawn in these and refer to them by name, so that a dark page can replace them."""

DARK = {
    "ink": "#e6ebf0",
    "dim": "#98a5b3",
    "rule": "#323c47",
    "paper": "#12171d",
    "panel": "#1b222a",
    "first": "#6cb2f2",
    "second": "#f2985c",
    "third": "#b8a1f0",
    "fourth": "#6fce8f",
    "good": "#6fce8f",
    "bad": "#f28b82",
}
"""The colors for readers whose system prefers dark pages."""
