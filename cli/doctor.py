"""`hymba-tune doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from hymba_tune.cli.screen import console, quiet_libraries
from hymba_tune.cli.settings import AsJson
from hymba_tune.config import DoctorConfig

if TYPE_CHECKING:
    from hymba_tune.doctor import Diagnosis


def doctor(
    *,
    as_json: AsJson = False,
    flags: Annotated[DoctorConfig, Parameter(name="*")] = DoctorConfig(),  # noqa: B008 (cyclopts reads the default)
) -> None:
    """Say what this machine has, which ways to compute are taken on it, and why not the others.

    Example: hymba-tune doctor --json

    Parameters
    ----------
    as_json
        Print it as JSON.
    """
    from hymba_tune.doctor import examine

    quiet_libraries()
    with console.status(Text("looking", style="dim")):
        found = examine(flags)
    if as_json:
        console.print_json(json.dumps(asdict(found)))
    else:
        _show(found)


def _show(found: Diagnosis) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    installed = " · ".join(f"{name} {version}" for name, version in found.versions.items() if version)
    table.add_row(" python", f"{found.python} · {found.platform}")
    table.add_row(" libraries", installed)
    memory = f"{found.memory_bytes / 2**30:.0f} GB"
    table.add_row(" device", " · ".join([f"{found.device} ({found.name}, {memory})", *found.details, found.dtype]))
    table.add_row(" hub", found.hub)
    console.print(table)
    console.print()
    console.print(_kernels(found))


def _kernels(found: Diagnosis) -> Table:
    """A row an operation and backend: which is taken, which could be, and why not the rest."""
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for heading in (" operation", "kernel"):
        table.add_column(heading, no_wrap=True, header_style="dim")
    table.add_column("", overflow="fold", header_style="dim")
    for operation, choice in found.kernels.items():
        verdicts = {choice.taken: Text("taken", style="green")}
        verdicts |= {name: Text("usable") for name in choice.usable}
        verdicts |= {name: Text(reason, style="dim") for name, reason in choice.obstacles.items()}
        for row, (name, verdict) in enumerate(verdicts.items()):
            table.add_row("" if row else f" {operation}", name, verdict)
    return table
