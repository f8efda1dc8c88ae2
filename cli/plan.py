"""`hymba-tune plan`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from hymba_tune.cli.screen import RichScreen, console, quiet_libraries
from hymba_tune.cli.settings import AsJson, combine_for
from hymba_tune.config import SFTConfig
from hymba_tune.config.groups import RUN
from hymba_tune.formatting import duration, format_bytes
from hymba_tune.train.screen import Screen

if TYPE_CHECKING:
    from hymba_tune.plan import DeviceEstimate, Plan


def plan(
    *,
    config: Annotated[str | None, Parameter(name=("--config", "--recipe"), group=RUN)] = None,
    verb: Annotated[str | None, Parameter(group=RUN)] = None,
    as_json: AsJson = False,
    flags: Annotated[SFTConfig, Parameter(name="*")] = SFTConfig(),  # noqa: B008 (cyclopts reads the default)
) -> None:
    """Say what a run would take of memory and time, and what to change where it does not fit. Loads no weights.

    For memory, rows are taken to be as long as --max-length lets them be; --dry-run of the verb itself looks at your
    data. Time is told where --steps or --data say how long the run is.

    Example: hymba-tune plan --recipe sft_lora --max-length 4096

    Parameters
    ----------
    config
        A recipe, whose flags may be changed as for the verb itself.
    verb
        What is planned, where no recipe says it: sft (default), dpo, kto or distill.
    as_json
        Print it as JSON.
    """
    from hymba_tune.inputs import check_inputs

    settings = combine_for(config, flags, verb)
    check_inputs(settings, complete=False)
    from hymba_tune.plan import plan as make

    quiet_libraries()
    with (Screen() if as_json else RichScreen()).working("planning") as progress:
        made = make(settings, progress)
    if as_json:
        console.print_json(json.dumps(asdict(made)))
    else:
        _show(made)


def _show(made: Plan) -> None:
    console.print(f" {made.model} · {made.settings}", markup=False)
    console.print(f" {made.tokens_per_step:,} tokens a step · {made.dtype} on a GPU", markup=False)
    if made.length:
        console.print(f" {made.length.steps:,} steps · {made.length.tokens:,} tokens in all", markup=False)
    console.print()
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    quantized = ["in NF4", ""] if made.here.nf4 is not None else []
    for heading in (" device", "needs", "", *quantized, "tok/s", *(["time"] if made.length else [])):
        table.add_column(heading, no_wrap=True, header_style="dim", justify="right" if heading[:1] != " " else "left")
    for verdict in [*made.gpus, made.here]:
        needs: list[str | Text] = [format_bytes(verdict.needs), _mark(verdict.needs <= verdict.has)]
        if verdict.nf4 is not None:
            needs += [format_bytes(verdict.nf4), _mark(verdict.nf4 <= verdict.has)]
        time = [] if verdict.seconds is None else ["< 1 s" if verdict.seconds < 1 else duration(verdict.seconds)]
        table.add_row(f" {verdict.device}", *needs, f"{verdict.tokens_per_s:,.0f}", *time)
    console.print(table)
    console.print()
    for verdict in [*made.gpus, made.here]:
        if not verdict.fits:
            console.print(f" for {verdict.device}: {_advice(verdict)}", markup=False)
    parts = " · ".join(f"{name} {format_bytes(size)}" for name, size in asdict(made.parts).items() if size)
    console.print(f" on a GPU: {parts}", style="dim", markup=False)
    console.print(
        " Memory is counted; on GPUs nothing is measured yet. Speed and time are rough guesses: on GPUs 30 % of their "
        "makers' figures, here from a matrix product timed just now. Time is of the steps alone, without evaluations.",
        style="dim",
        markup=False,
    )


def _mark(fits: bool) -> Text:
    return Text("✓", style="green") if fits else Text("✗", style="red")


def _advice(verdict: DeviceEstimate) -> str:
    return "nothing here makes it fit; take another device" if verdict.change is None else verdict.change
