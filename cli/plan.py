"""`hymba-tune plan`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from hymba_tune.cli.screen import RichScreen, console, loading, quiet_libraries
from hymba_tune.cli.settings import AsJson, RecipeName, checking, combine_for
from hymba_tune.config import PlanConfig
from hymba_tune.config.groups import FIRST, RUN
from hymba_tune.formatting import duration, format_bytes
from hymba_tune.train.screen import Screen

if TYPE_CHECKING:
    from hymba_tune.plan import DeviceEstimate, Plan


def plan(
    *,
    config: Annotated[RecipeName | None, Parameter(name=("--config", "--recipe"), group=(RUN, FIRST))] = None,
    verb: Annotated[str | None, Parameter(group=(RUN, FIRST))] = None,
    as_json: AsJson = False,
    flags: Annotated[PlanConfig, Parameter(name="*")] = PlanConfig(),  # noqa: B008 (cyclopts reads the default)
) -> None:
    """Estimate the memory and time of a run, and what to change where it does not fit. Loads no weights.

    Memory is estimated for rows of --max-length tokens; the verb's own --dry-run uses your data instead. Time is
    estimated where --steps or --data determine the length of the run. With --nproc it is the share of each process,
    and the GPUs need not be here.

    Example: hymba-tune plan --recipe sft_lora --max-length 4096 --nproc 8 --strategy zero3

    Parameters
    ----------
    config
        A recipe. Flags override it, as for the verb itself.
    verb
        The verb to plan for, where no recipe names it: sft (default), dpo, kto, orpo, reward, grpo or distill.
    as_json
        Print the plan as JSON.
    """
    with checking():
        from hymba_tune.inputs import check_inputs

        settings = combine_for(config, flags, verb)
        check_inputs(settings, complete=False)
    with loading():
        from hymba_tune.plan import plan as plan_run

    quiet_libraries()
    with (Screen() if as_json else RichScreen()).working("planning") as progress:
        planned = plan_run(settings, progress)
    if as_json:
        console.print_json(json.dumps(asdict(planned)))
    else:
        _show(planned)


def _show(planned: Plan) -> None:
    console.print(f" {planned.model} · {planned.settings}", markup=False)
    console.print(f" {planned.tokens_per_step:,} tokens a step · {planned.dtype} on a GPU", markup=False)
    if planned.processes > 1:
        words = f"{planned.processes:,} processes · {planned.strategy} · {planned.rows_per_step:,} rows a step"
        console.print(f" {words} · each sends {format_bytes(planned.bytes_sent)} a step", markup=False)
    if planned.length:
        console.print(f" {planned.length.steps:,} steps · {planned.length.tokens:,} tokens in all", markup=False)
    console.print()
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    quantized = ["in NF4", ""] if planned.here.nf4 is not None else []
    for heading in (" device", "needs", "", *quantized, "tok/s", *(["time"] if planned.length else [])):
        table.add_column(heading, no_wrap=True, header_style="dim", justify="right" if heading[:1] != " " else "left")
    for estimate in [*planned.gpus, planned.here]:
        needs: list[str | Text] = [format_bytes(estimate.needs), _mark(estimate.needs <= estimate.has)]
        if estimate.nf4 is not None:
            needs += [format_bytes(estimate.nf4), _mark(estimate.nf4 <= estimate.has)]
        time = [] if estimate.seconds is None else ["< 1 s" if estimate.seconds < 1 else duration(estimate.seconds)]
        table.add_row(f" {estimate.device}", *needs, f"{estimate.tokens_per_s:,.0f}", *time)
    console.print(table)
    console.print()
    for estimate in [*planned.gpus, planned.here]:
        if not estimate.fits:
            console.print(f" for {estimate.device}: {_advice(estimate)}", markup=False)
    parts = asdict(planned.parts)
    offloaded = parts.pop("offloaded")
    listed = " · ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
    console.print(f" on a GPU: {listed}", style="dim", markup=False)
    if offloaded:
        console.print(f" in CPU memory, for each process: {format_bytes(offloaded)}", style="dim", markup=False)
    console.print(
        " Memory is counted, not measured on a GPU. Speed and time are estimates from the matrix products, bytes and "
        "kernels of a step: on GPUs at shares of their makers' figures, here at speeds timed now. Time covers the "
        "steps, without evaluations.",
        style="dim",
        markup=False,
    )
    if planned.processes > 1:
        console.print(
            " Each process has a GPU. Their speed includes the exchange over the GPUs' own links, as if nothing "
            "overlapped with it, and over 100 Gb/s between machines.",
            style="dim",
            markup=False,
        )


def _mark(fits: bool) -> Text:
    return Text("✓", style="green") if fits else Text("✗", style="red")


def _advice(estimate: DeviceEstimate) -> str:
    return "no settings make it fit; use another device" if estimate.change is None else estimate.change
