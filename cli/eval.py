"""`hymba-tune eval`."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from hymba_tune.cli.screen import RichScreen, console, error_console, loading, print_chosen_gpu, quiet_libraries
from hymba_tune.cli.settings import AsJson, check_first
from hymba_tune.config import EvalConfig
from hymba_tune.errors import HymbaTuneError
from hymba_tune.train.screen import Screen

if TYPE_CHECKING:
    from hymba_tune.evaluate import Evaluation


def measure(
    model: Annotated[str, Parameter(name="MODEL")],
    /,
    *,
    as_json: AsJson = False,
    flags: Annotated[EvalConfig, Parameter(name="*")] = EvalConfig(),  # noqa: B008 (cyclopts reads the default)
) -> None:
    """Evaluate a model, or compare several: loss, perplexity, bits per byte, exact match, lm-eval tasks.

    Example: hymba-tune eval runs/my-run --base --data test.jsonl --answers gsm8k

    Parameters
    ----------
    model
        A run directory, which keeps the results in its report, or any model that --model accepts.
    as_json
        Print the results as JSON.
    """
    flags.model = model
    check_first(flags)
    with loading():
        from hymba_tune.evaluate import check_run, evaluate, facts, run_of, save

    run = run_of(flags)
    if run:
        check_run(run)
    for folder in (name for name in flags.tasks if Path(name).expanduser().is_dir()):
        note = f"--tasks {folder}: lm-eval runs the Python code of the tasks in this folder"
        error_console.print(f" {note}", markup=False, soft_wrap=True)
    quiet_libraries()
    print_chosen_gpu(flags.device)
    if as_json:
        with contextlib.redirect_stdout(io.StringIO()):  # libraries' output would break the JSON
            evaluation = evaluate(flags, Screen().working)
    else:
        evaluation = evaluate(flags, RichScreen().working)
    notes = [result.note for result in evaluation.results if result.note]
    if run:
        notes += _add_to_run(evaluation, run)
    save(evaluation)  # last: once these files have their names, the command is done
    if as_json:
        console.print_json(json.dumps(facts(evaluation), ensure_ascii=False))
        return
    _show(facts(evaluation))
    for note in notes:
        console.print(f" {note}", style="dim", markup=False, soft_wrap=True)
    for label, path in (
        ("results", flags.out),
        ("answers", flags.save_answers),
        ("report", run and run / "report.html"),
    ):
        if path:
            console.print(f" {label:<8} {path}", markup=False, soft_wrap=True)


def _add_to_run(evaluation: Evaluation, run: Path) -> list[str]:
    """Add an evaluation to the run's report, and return the reason if that cannot be written."""
    from hymba_tune.evaluate import add_to_run
    from hymba_tune.report import write_report

    try:
        add_to_run(evaluation, run)
        write_report(run)
    except HymbaTuneError as error:
        return [f"not added to the run's report: {error.what}"]
    return []


def _show(facts: dict[str, Any]) -> None:
    from hymba_tune.report import tabulate

    table = tabulate(facts)
    console.print(f" {table.what}", style="dim", markup=False)
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    grid.add_column("", overflow="fold")
    for name in table.columns:
        grid.add_column(name, justify="right", overflow="fold", header_style="dim")
    for line in table.lines:
        grid.add_row(Text(f" {line.label}", style="dim"), *map(Text, line.cells))
    console.print(grid)
    for verdict in table.verdicts:
        console.print(f" {verdict}", markup=False)
