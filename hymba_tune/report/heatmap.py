"""How far training moved each part of the model, by layer, as a heat map."""

from __future__ import annotations

from statistics import median
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hymba_tune.pages import LIGHT, SIZE, Plot, plot

GROUPS = ("attention", "SSM", "attention + SSM", "MLP")
"""Groups of the map's rows, from the top; parts outside the layers are named in the note below."""
SMALL_NORMS = (
    " Above 100 %, a part moved by more than its norm, as is usual where that is small: in meta tokens, for one."
)
SHADES = 40
"""The number of colors: few enough that the color bar is drawn as vectors, not embedded as a picture."""


def updates_plot(parts: list[dict[str, Any]], *, from_base: bool = False) -> Plot | None:
    """Plot the heat map of ``updates.json``.

    Args:
        parts: Dicts with ``group``, ``part``, ``layer`` and ``size``, a share of the weight's norm or None.
        from_base: Whether the run trained an adapter further; the map then includes earlier training, and says so.

    Returns:
        The plot; None if no part of a layer was trained.
    """
    inside = [part for part in parts if part["layer"] is not None and part["group"] in GROUPS]
    if not inside:
        return None
    rows = sorted({(part["group"], part["part"]): None for part in inside}, key=lambda row: GROUPS.index(row[0]))
    layers = range(max(part["layer"] for part in inside) + 1)
    cells = {((part["group"], part["part"]), part["layer"]): part["size"] for part in inside}
    grid = [[_percent(cells.get((row, layer))) for layer in layers] for row in rows]

    def draw(axes: Axes) -> None:
        map_ = axes.pcolormesh(
            [layer - 0.5 for layer in (*layers, len(layers))],
            range(len(rows) + 1),
            grid,
            cmap=mpl.colormaps["cividis"].resampled(SHADES),
            vmin=0,
            edgecolor=LIGHT["paper"],
            linewidth=0.4,
        )
        axes.grid(visible=False)
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
        axes.set(xlabel="layer", yticks=[index + 0.5 for index in range(len(rows))])
        axes.set_yticklabels([_label(*row) for row in rows])
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        bar = axes.figure.colorbar(map_, ax=axes, pad=0.02, aspect=30)
        bar.solids.set_edgecolor("face")  # type: ignore[union-attr]
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))

    size = (SIZE[0], 1.0 + 0.21 * len(rows))
    title = "How far the weights moved"
    note = _note(parts)
    if from_base:
        title = f"{title} from the base"
        note = f"{note} The run trained an adapter further; the changes of its earlier training are included."
    return plot(title, _alt(inside), draw, size=size, note=note)


def _percent(size: float | None) -> float:
    return float("nan") if size is None else 100 * size


def _written(size: float) -> str:
    percent = 100 * size
    return f"{percent:,.0f} %" if percent >= 10 else f"{percent:.2g} %"


def _label(group: str, part: str) -> str:
    return part if group in ("MLP", "attention + SSM") else f"{group} {part}"


def _note(parts: list[dict[str, Any]]) -> str:
    """Return the median change of each group, including those outside the layers."""
    groups = dict.fromkeys(part["group"] for part in parts)
    sizes = {group: [p["size"] for p in parts if p["group"] == group and p["size"] is not None] for group in groups}
    medians = " · ".join(f"{group} {_written(median(known))}" for group, known in sizes.items() if known)
    broken = sum(part["size"] is None for part in parts)
    explained = "‖ΔW‖ / ‖W‖ of each part, by layer. Blank: not trained, or shared with the layer before. Medians"
    large = any(median(known) > 1 for known in sizes.values() if known)
    return f"{explained}: {medians}.{SMALL_NORMS if large else ''}" + (
        f" {broken} parts hold NaN or infinity." if broken else ""
    )


def _alt(inside: list[dict[str, Any]]) -> str:
    known = [part for part in inside if part["size"] is not None]
    if not known:
        return "No part of any layer has a finite change."
    most, least = (choose(known, key=lambda part: part["size"]) for choose in (max, min))
    ends = [f"{_label(p['group'], p['part'])} of layer {p['layer']} ({_written(p['size'])})" for p in (most, least)]
    return f"How far each part of each layer moved, in percent of its norm: most {ends[0]}, least {ends[1]}."
