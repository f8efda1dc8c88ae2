"""Curves of the metrics of one run, or of several runs on the same axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice, product

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hymba_tune.pages import LIGHT, Plot, picture, plot
from hymba_tune.report.measures import Measure, measure, order
from hymba_tune.report.record import RunRecord

FEW = 40
"""The most points that are marked one by one."""
COLOURS = ("first", "second", "third", "fourth")
LINES = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"))
"""Line styles and markers that distinguish curves on the same axes, also in gray."""
MOST_SOURCES = 8
LABEL = 18
"""The most characters of a source's name in a plot."""


def loss_plot(record: RunRecord) -> Plot | None:
    """Plot the training and held-out loss, with a line at the first evaluation; None if there is no loss."""
    return _with_held_out(record, "loss")


def loss_picture(record: RunRecord) -> tuple[str, bytes] | None:
    """Return the loss plot as a sentence and a PNG; None if there is no loss."""
    drawing = _drawing(record, "loss")
    return (drawing[1], picture(drawing[2])) if drawing else None


def other_plots(record: RunRecord) -> list[Plot]:
    """Plot every other measure of a run."""
    names = sorted((name for name in record.measures if name.partition("/")[0] != "loss"), key=order)
    plots = [_by_source(record), *(_with_held_out(record, name) for name in names)]
    return [drawn for drawn in plots if drawn is not None]


def overlaid_plots(records: Mapping[str, RunRecord]) -> list[Plot]:
    """Plot the measures of several runs on the same axes.

    Args:
        records: The runs by their letters in the plots.
    """
    verbs = {record.verb for record in records.values()}
    verb = verbs.pop() if len(verbs) == 1 else None
    names = sorted(dict.fromkeys(name for record in records.values() for name in record.measures), key=order)
    plots = []
    for name, held_out in product(names, (True, False)):
        measured = measure(name, verb)
        values = RunRecord.held_out if held_out else RunRecord.series
        curves = {letter: values(record, name) for letter, record in records.items()}
        if any(steps for steps, _ in curves.values()):
            title = f"Held-out {measured.title[0].lower()}{measured.title[1:]}" if held_out else measured.title
            plots.append(_overlaid(title, measured, curves))
    return plots


def _by_source(record: RunRecord) -> Plot | None:
    """Plot the held-out loss of each source; None where there is only one."""
    curves = record.source_losses
    title = "Held-out loss by source"
    if len(curves) > MOST_SOURCES:
        title += f" (the first {MOST_SOURCES} of {len(curves)})"
    shown = dict(islice(zip(_labels(curves), curves.values(), strict=True), MOST_SOURCES))
    return _overlaid(title, measure("loss", record.verb), shown, columns=2) if curves else None


def _labels(names: Iterable[str]) -> list[str]:
    """Shorten names so that two fit side by side, and keep them distinct."""
    labels = [name if len(name) <= LABEL else f"{name[: LABEL // 2]}…{name[-LABEL // 2 + 1 :]}" for name in names]
    return labels if len(set(labels)) == len(labels) else [f"{i} {label}" for i, label in enumerate(labels, start=1)]


def _with_held_out(record: RunRecord, name: str) -> Plot | None:
    drawing = _drawing(record, name)
    if drawing is None:
        return None
    shown = [*record.series(name)[1], *record.held_out(name)[1]]
    broken = sum(not math.isfinite(value) for value in shown)
    values = "1 value is" if broken == 1 else f"{broken:,} values are"
    return plot(*drawing, note=f"Gaps: {values} NaN or infinite." if broken else "")


def _drawing(record: RunRecord, name: str) -> tuple[str, str, Callable[[Axes], None]] | None:
    """Return the title of a plot, its content as a sentence, and the function that draws it."""
    measured = measure(name, record.verb)
    trained, held_out = record.series(name), record.held_out(name)
    if not trained[0] and not held_out[0]:
        return None
    predicted = record.facts.get("memory", {}).get("predicted_bytes") if name == "memory_bytes" else None

    def draw(axes: Axes) -> None:
        if trained[0]:
            _line(axes, trained, measured, color=LIGHT["first"], label="training" if held_out[0] else None)
        if held_out[0]:
            _line(axes, held_out, measured, color=LIGHT["second"], marker="o", markersize=5, label="held out")
        if measured.chance is not None:
            _compare_with(axes, measured.chance / measured.scale, "by chance")
        elif held_out[0][:1] == [0]:
            _compare_with(axes, held_out[1][0] / measured.scale, "held out, before")
        if predicted:
            _compare_with(axes, predicted / measured.scale, "predicted")
        _axes(axes, measured, zero=name in ("tokens_per_s", "memory_bytes", "learning_rate"))
        if held_out[0] or predicted or measured.chance is not None:
            _legend(axes)

    parts = [_described(measured, trained, "" if not held_out[0] else "in training")] if trained[0] else []
    parts += [_described(measured, held_out, "on held-out data")] if held_out[0] else []
    parts += [f"predicted {measured.written(predicted)}"] if predicted else []
    return measured.title, f"{measured.title}: {'; '.join(parts)}.", draw


def _overlaid(
    title: str, measured: Measure, curves: Mapping[str, tuple[list[int], list[float]]], *, columns: int = 4
) -> Plot:
    def draw(axes: Axes) -> None:
        for number, (letter, curve) in enumerate(curves.items()):
            turn, place = divmod(number, len(COLOURS))
            color, (dashes, marker) = COLOURS[place], LINES[(place + turn) % len(LINES)]
            if curve[0]:
                _line(axes, curve, measured, color=LIGHT[color], linestyle=dashes, marker=marker, label=letter)
        _axes(axes, measured)
        _legend(axes, columns)

    parts = "; ".join(_described(measured, curve, letter) for letter, curve in curves.items() if curve[0])
    return plot(title, f"{title}: {parts}.", draw)


def _line(axes: Axes, curve: tuple[list[int], list[float]], measured: Measure, **style: object) -> None:
    steps, values = curve
    shown = [value / measured.scale if math.isfinite(value) else math.nan for value in values]
    if len(steps) > FEW:
        style["marker"] = ""
    elif "marker" not in style:
        style |= {"marker": "o", "markersize": 2.5}
    axes.plot(steps, shown, **style)  # type: ignore[arg-type]


def _compare_with(axes: Axes, value: float, label: str) -> None:
    axes.axhline(value, color=LIGHT["dim"], linewidth=1, linestyle=(0, (4, 3)), label=label)


def _axes(axes: Axes, measured: Measure, *, zero: bool = False) -> None:
    axes.set(xlabel="step", ylabel=measured.unit)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if 1e4 <= value < 1e7 else f"{value:g}")
    )
    if zero:
        axes.set_ylim(bottom=0)


def _legend(axes: Axes, columns: int = 4) -> None:
    """Draw the legend above the curves, where it covers none."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, columnspacing=1.2, handlelength=2, borderpad=0.2
    )


def _described(measured: Measure, curve: tuple[Sequence[int], Sequence[float]], which: str) -> str:
    (first, *_, last) = (*curve[1][:1], *curve[1])
    begin, end = curve[0][0], curve[0][-1]
    what = f"{which} " if which else ""
    return f"{what}{measured.written(first)} at step {begin:,}, {measured.written(last)} at step {end:,}"
