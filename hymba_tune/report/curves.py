"""Curves of what runs measured: of one run, or of several on the same axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hymba_tune.pages import LIGHT, Plot, picture, plot
from hymba_tune.report.measures import Measure, measure, order
from hymba_tune.report.record import RunRecord

FEW = 40
"""Up to so many points each is marked."""
COLOURS = ("first", "second", "third", "fourth")
LINES = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"))
"""How curves on the same axes are told apart, also in gray."""
MOST_SOURCES = 8
LABEL = 18
"""Characters of a source's name in a plot."""


def loss_plot(record: RunRecord) -> Plot | None:
    """Training and held-out loss, with the first evaluation as a line to compare with; None if there is none."""
    return _with_held_out(record, "loss")


def loss_picture(record: RunRecord) -> tuple[str, bytes] | None:
    """The same as a PNG, behind what it says in a sentence."""
    drawing = _drawing(record, "loss")
    return (drawing[1], picture(drawing[2])) if drawing else None


def other_plots(record: RunRecord) -> list[Plot]:
    """A plot for everything else that the run measured."""
    names = sorted((name for name in record.measures if name.partition("/")[0] != "loss"), key=order)
    plots = [_by_source(record), *(_with_held_out(record, name) for name in names)]
    return [drawn for drawn in plots if drawn is not None]


def overlaid_plots(records: Mapping[str, RunRecord]) -> list[Plot]:
    """What several runs measured, on the same axes.

    Args:
        records: By the letter that stands for each in the plots.
    """
    verbs = {record.verb for record in records.values()}
    verb = verbs.pop() if len(verbs) == 1 else None
    names = sorted(dict.fromkeys(name for record in records.values() for name in record.measures), key=order)
    plots = []
    for name in (both for one in names for both in (f"eval_{one}", one)):
        kind = measure(name.removeprefix("eval_"), verb)
        curves = {letter: record.series(name) for letter, record in records.items()}
        if any(steps for steps, _ in curves.values()):
            held_out = name.startswith("eval_")
            title = f"Held-out {kind.title[0].lower()}{kind.title[1:]}" if held_out else kind.title
            plots.append(_overlaid(title, kind, curves))
    return plots


def _by_source(record: RunRecord) -> Plot | None:
    """The held-out loss of each source; None where there is but one."""
    curves = record.source_losses
    title = "Held-out loss by source"
    if len(curves) > MOST_SOURCES:
        title += f" (the first {MOST_SOURCES} of {len(curves)})"
    shown = dict(islice(zip(_labels(curves), curves.values(), strict=True), MOST_SOURCES))
    return _overlaid(title, measure("loss", record.verb), shown, columns=2) if curves else None


def _labels(names: Iterable[str]) -> list[str]:
    """Names so short that there is room for two beside each other, and no two the same."""
    labels = [name if len(name) <= LABEL else f"{name[: LABEL // 2]}…{name[-LABEL // 2 + 1 :]}" for name in names]
    return labels if len(set(labels)) == len(labels) else [f"{i} {label}" for i, label in enumerate(labels, start=1)]


def _with_held_out(record: RunRecord, name: str) -> Plot | None:
    drawing = _drawing(record, name)
    return plot(*drawing) if drawing else None


def _drawing(record: RunRecord, name: str) -> tuple[str, str, Callable[[Axes], None]] | None:
    """The title of a plot, what it says, and what draws it."""
    kind = measure(name, record.verb)
    trained, held_out = record.series(name), record.series(f"eval_{name}")
    if not trained[0] and not held_out[0]:
        return None
    predicted = record.facts.get("memory", {}).get("predicted_bytes") if name == "memory_bytes" else None

    def draw(axes: Axes) -> None:
        if trained[0]:
            _line(axes, trained, kind, color=LIGHT["first"], label="training" if held_out[0] else None)
        if held_out[0]:
            _line(axes, held_out, kind, color=LIGHT["second"], marker="o", markersize=5, label="held out")
        if kind.chance is not None:
            _compare_with(axes, kind.chance / kind.scale, "by chance")
        elif held_out[0]:
            _compare_with(axes, held_out[1][0] / kind.scale, "held out, before")
        if predicted:
            _compare_with(axes, predicted / kind.scale, "predicted")
        _axes(axes, kind, zero=name in ("tokens_per_s", "memory_bytes", "learning_rate"))
        if held_out[0] or predicted or kind.chance is not None:
            _legend(axes)

    said = [_said(kind, trained, "" if not held_out[0] else "in training")] if trained[0] else []
    said += [_said(kind, held_out, "on held-out data")] if held_out[0] else []
    said += [f"predicted {kind.written(predicted)}"] if predicted else []
    return kind.title, f"{kind.title}: {'; '.join(said)}.", draw


def _overlaid(
    title: str, kind: Measure, curves: Mapping[str, tuple[list[int], list[float]]], *, columns: int = 4
) -> Plot:
    def draw(axes: Axes) -> None:
        for number, (letter, curve) in enumerate(curves.items()):
            turn, place = divmod(number, len(COLOURS))
            color, (dashes, marker) = COLOURS[place], LINES[(place + turn) % len(LINES)]
            if curve[0]:
                _line(axes, curve, kind, color=LIGHT[color], linestyle=dashes, marker=marker, label=letter)
        _axes(axes, kind)
        _legend(axes, columns)

    said = "; ".join(_said(kind, curve, letter) for letter, curve in curves.items() if curve[0])
    return plot(title, f"{title}: {said}.", draw)


def _line(axes: Axes, curve: tuple[list[int], list[float]], kind: Measure, **style: object) -> None:
    steps, values = curve
    shown = [value / kind.scale if math.isfinite(value) else math.nan for value in values]
    if len(steps) > FEW:
        style["marker"] = ""
    elif "marker" not in style:
        style |= {"marker": "o", "markersize": 2.5}
    axes.plot(steps, shown, **style)  # type: ignore[arg-type]


def _compare_with(axes: Axes, value: float, label: str) -> None:
    axes.axhline(value, color=LIGHT["dim"], linewidth=1, linestyle=(0, (4, 3)), label=label)


def _axes(axes: Axes, kind: Measure, *, zero: bool = False) -> None:
    axes.set(xlabel="step", ylabel=kind.unit)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if 1e4 <= value < 1e7 else f"{value:g}")
    )
    if zero:
        axes.set_ylim(bottom=0)


def _legend(axes: Axes, columns: int = 4) -> None:
    """Above the curves, where it hides none."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, columnspacing=1.2, handlelength=2, borderpad=0.2
    )


def _said(kind: Measure, curve: tuple[Sequence[int], Sequence[float]], which: str) -> str:
    (first, *_, last) = (*curve[1][:1], *curve[1])
    begin, end = curve[0][0], curve[0][-1]
    what = f"{which} " if which else ""
    return f"{what}{kind.written(first)} at step {begin:,}, {kind.written(last)} at step {end:,}"
