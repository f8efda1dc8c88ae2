"""A data check as an HTML page."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hymba_tune.data.check_counts import Check
from hymba_tune.data.check_facts import facts, histogram, problems
from hymba_tune.data.rows import listing
from hymba_tune.formatting import share
from hymba_tune.pages import LIGHT, Plot, plot, render

TICKS = 6
THOUSANDS = FuncFormatter(lambda value, _: f"{value:,.0f}")


def check_page(check: Check, *, model: str, commands: Sequence[tuple[str, str]]) -> str:
    """Render a check as a page.

    Args:
        check: The check to render.
        model: Name of the model whose tokenizer was used.
        commands: The next commands: a label and a command line each.
    """
    return render(
        "hymba_tune.data",
        "check.html.j2",
        names=listing(file.name for file in check.files),
        model=model,
        facts=facts(check),
        problems=problems(check),
        plots=[chart for chart in (_lengths(check), _rows(check), _tokens(check), _pairs(check)) if chart],
        commands=commands,
    )


def _lengths(check: Check) -> Plot | None:
    bars = histogram(check.lengths)
    if not bars:
        return None
    edges = [low for low, _, _ in bars] + [(bars[-1][1] or max(check.lengths.rows)) + 1]

    def draw(axes: Axes) -> None:
        axes.bar(range(len(bars)), [rows for _, _, rows in bars], width=0.92, align="edge", color=LIGHT["first"])
        if edges[0] < check.max_length < edges[-1]:
            at = float(np.interp(check.max_length, edges, range(len(edges))))
            axes.axvline(at, color=LIGHT["second"], linestyle="--", label=f"--max-length {check.max_length:,}")
            axes.legend(loc="upper right")
        ticks = range(0, len(edges), -(-len(edges) // TICKS))
        axes.set_xticks(ticks, [f"{edges[index]:,}" for index in ticks])
        axes.set(xlabel="tokens per row", ylabel="rows")
        axes.grid(visible=False, axis="x")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter(THOUSANDS)

    median = check.lengths.quantile(0.5)
    return plot("Row lengths", f"Half of the rows have up to {median:,} tokens.", draw)


def _rows(check: Check) -> Plot | None:
    if not check.rows:
        return None
    whole = check.rows - check.bad_rows - check.too_long - check.cut - check.continued
    kinds = {
        "whole": whole,
        "cut": check.cut,
        "continued": check.continued,
        "too long": check.too_long,
        "bad": check.bad_rows,
    }
    kinds = {name: count for name, count in kinds.items() if count or name in ("whole", "bad")}
    return plot(
        "Use of rows",
        f"{whole:,} of {check.rows:,} rows are trained on as a whole.",
        lambda axes: _bars(axes, kinds, "rows", bad={"too long", "bad"}),
    )


def _tokens(check: Check) -> Plot | None:
    if not check.tokens:
        return None
    kinds = {"with loss": check.learned, "context": check.tokens - check.learned, "cut off": check.tokens_lost}
    return plot(
        "Use of tokens",
        f"{share(check.learned, check.tokens)} of the tokens that are trained on have loss.",
        lambda axes: _bars(axes, kinds, "tokens", bad={"cut off"}),
        note="The model reads the context without loss on it.",
    )


def _pairs(check: Check) -> Plot | None:
    pairs = check.pairs
    if not pairs or not pairs.rows:
        return None
    even = pairs.rows - pairs.chosen_longer - pairs.rejected_longer
    kinds = {"chosen": pairs.chosen_longer, "rejected": pairs.rejected_longer, "neither": even}
    return plot(
        "The longer answer",
        f"The chosen answer is longer in {share(pairs.chosen_longer, pairs.rows)} of the pairs.",
        lambda axes: _bars(axes, kinds, "pairs", bad=set()),
        note="If one side is nearly always longer, the model learns to prefer a length.",
    )


def _bars(axes: Axes, kinds: dict[str, int], unit: str, *, bad: set[str]) -> None:
    """Draw horizontal bars with their numbers; those of lost rows or tokens are hatched."""
    names = list(kinds)
    bars = axes.barh(
        names, list(kinds.values()), height=0.6, color=[LIGHT["second" if name in bad else "first"] for name in names]
    )
    for name, bar in zip(names, bars, strict=True):
        if name in bad:
            bar.set(hatch="///", edgecolor=LIGHT["paper"])
    axes.bar_label(bars, labels=[f"{count:,}" for count in kinds.values()], padding=3, color=LIGHT["ink"])
    axes.invert_yaxis()
    axes.margins(x=0.22)
    axes.set(xlabel=unit)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(THOUSANDS)
