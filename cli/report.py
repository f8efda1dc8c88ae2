"""`hymba-tune report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from hymba_tune.cli.screen import console
from hymba_tune.cli.settings import Overwrite
from hymba_tune.config.groups import RESULT

if TYPE_CHECKING:
    from hymba_tune.report import RunRecord, Verdict


def report(
    run: Annotated[Path, Parameter(name="RUN")],
    /,
    *others: Annotated[Path, Parameter(name="RUN")],
    out: Annotated[Path | None, Parameter(group=RESULT)] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a run's report.html again, or compare several runs on one page.

    Example: hymba-tune report runs/my-run

    Compare: hymba-tune report runs/one runs/other --out compare.html

    Parameters
    ----------
    run
        A run directory.
    others
        Further run directories, to compare it with.
    out
        The file of the page. Default: report.html in the run directory, or compare.html for a comparison.
    overwrite
        Replace the file of --out if it exists.
    """
    from hymba_tune.report import write_comparison, write_report

    if others:
        page = out or Path("compare.html")
        _show_comparison(write_comparison([run, *others], page, overwrite=overwrite))
    else:
        page, verdict = write_report(run, out, overwrite=overwrite)
        _show_verdict(verdict)
    console.print(f"\n open it in a browser: {page}", markup=False, soft_wrap=True)


def _show_verdict(verdict: Verdict) -> None:
    console.print(f" {verdict.sentence}", markup=False)
    table = Table.grid(padding=(0, 2))
    for what, value, more in verdict.figures:
        table.add_row(Text(f" {what}", style="dim"), Text(value), Text(more, style="dim"))
    console.print(table)
    for note in verdict.notes:
        console.print(f" {note}", markup=False)


def _show_comparison(runs: list[tuple[str, RunRecord, dict[str, str]]]) -> None:
    from hymba_tune.report import best_run

    console.print(f" {best_run({letter: record for letter, record, _ in runs})}", markup=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    table.add_column("", overflow="fold")
    for letter, record, _ in runs:
        table.add_column(f"{letter} {record.name}", justify="right", overflow="fold", header_style="dim")
    for name in dict.fromkeys(name for *_, figures in runs for name in figures):
        table.add_row(Text(f" {name}", style="dim"), *(Text(figures.get(name, "–")) for *_, figures in runs))
    console.print(table)
