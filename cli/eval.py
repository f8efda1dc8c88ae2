"""`hymba-tune eval`."""

from __future__ import annotations

import contextlib
import io
import json
from typing import Annotated, Any

from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from hymba_tune.cli.screen import RichScreen, console, quiet_libraries, say_which_gpu
from hymba_tune.cli.settings import AsJson, check_first
from hymba_tune.config import EvalConfig
from hymba_tune.train.screen import Screen


def measure(
    model: Annotated[str, Parameter(name="MODEL")],
    /,
    *,
    as_json: AsJson = False,
    flags: Annotated[EvalConfig, Parameter(name="*")] = EvalConfig(),  # noqa: B008 (cyclopts reads the default)
) -> None:
    """Measure a model: loss, perplexity and bits per byte on data, right answers, lm-eval's tasks; beside others.

    Example: hymba-tune eval runs/my-run --base --data test.jsonl --answers gsm8k

    Parameters
    ----------
    model
        A run directory, which keeps the results in its report, or whatever --model takes.
    as_json
        Print the results as JSON.
    """
    flags.model = model
    check_first(flags)
    from hymba_tune.evaluate import add_to_run, evaluate, facts, run_of, save
    from hymba_tune.report import write_report

    quiet_libraries()
    say_which_gpu(flags.device)
    if as_json:
        with contextlib.redirect_stdout(io.StringIO()):  # libraries' words are not JSON
            found = evaluate(flags, Screen().working)
    else:
        found = evaluate(flags, RichScreen().working)
    save(found)
    run = run_of(flags)
    if run:
        add_to_run(found, run)
        write_report(run)
    if as_json:
        console.print_json(json.dumps(facts(found), ensure_ascii=False))
        return
    _show(facts(found))
    for note in filter(None, (result.note for result in found.results)):
        console.print(f" {note}", style="dim", markup=False, soft_wrap=True)
    for label, path in (
        ("results", flags.out),
        ("answers", flags.save_answers),
        ("report", run and run / "report.html"),
    ):
        if path:
            console.print(f" {label:<8} {path}", markup=False, soft_wrap=True)


def _show(facts: dict[str, Any]) -> None:
    from hymba_tune.report import tabulate

    found = tabulate(facts)
    console.print(f" {found.what}", style="dim", markup=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", overflow="fold")
    for name in found.columns:
        table.add_column(name, justify="right", overflow="fold", header_style="dim")
    for line in found.lines:
        table.add_row(Text(f" {line.label}", style="dim"), *map(Text, line.cells))
    console.print(table)
