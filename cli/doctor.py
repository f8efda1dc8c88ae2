"""`hymba-tune doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from hymba_tune.cli.screen import console, loading, quiet_libraries
from hymba_tune.cli.settings import AsJson
from hymba_tune.config import DoctorConfig

if TYPE_CHECKING:
    from hymba_tune.doctor import Diagnosis


def doctor(
    *,
    as_json: AsJson = False,
    flags: Annotated[DoctorConfig, Parameter(name="*")] = DoctorConfig(),  # noqa: B008 (cyclopts reads the default)
) -> None:
    """Show this machine's hardware and libraries, the kernels that are used on it, and why others are not.

    Example: hymba-tune doctor --json

    Parameters
    ----------
    as_json
        Print the diagnosis as JSON.
    """
    with loading():
        from hymba_tune.doctor import examine

    quiet_libraries()
    with console.status(Text("examining", style="dim")):
        diagnosis = examine(flags)
    if as_json:
        console.print_json(json.dumps(asdict(diagnosis)))
    else:
        _show(diagnosis)


def _show(diagnosis: Diagnosis) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    installed = " · ".join(f"{name} {version}" for name, version in diagnosis.versions.items() if version)
    table.add_row(" python", f"{diagnosis.python} · {diagnosis.platform}")
    table.add_row(" libraries", installed)
    memory = f"{diagnosis.memory_bytes / 2**30:.0f} GB"
    device = f"{diagnosis.device} ({diagnosis.name}, {memory})"
    table.add_row(" device", " · ".join([device, *diagnosis.details, diagnosis.dtype]))
    table.add_row(" hub", diagnosis.hub)
    console.print(table)
    console.print()
    console.print(_kernels(diagnosis))
    console.print()
    platforms = Table(box=None, pad_edge=False, padding=(0, 2), show_header=False)
    platforms.add_column(no_wrap=True)
    platforms.add_column(overflow="fold", style="dim")
    for name, status in diagnosis.platforms.items():
        platforms.add_row(f" {name}", status)
    console.print(platforms)
    for extra, build in diagnosis.builds.items():
        console.print()
        console.print(Text(f" To build {extra} for this card:", style="dim"))
        console.print(Text(f" {build}"), soft_wrap=True)


def _kernels(diagnosis: Diagnosis) -> Table:
    """A row for each operation and backend: used, usable, or the reason why it cannot be used."""
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for heading in (" operation", "kernel"):
        table.add_column(heading, no_wrap=True, header_style="dim")
    table.add_column("", overflow="fold", header_style="dim")
    for operation, choice in diagnosis.kernels.items():
        verdicts = {choice.taken: Text("used", style="green")}
        verdicts |= {name: Text("usable") for name in choice.usable}
        verdicts |= {name: Text(reason, style="dim") for name, reason in choice.obstacles.items()}
        for row, (name, verdict) in enumerate(verdicts.items()):
            table.add_row("" if row else f" {operation}", name, verdict)
    return table
