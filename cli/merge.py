"""`hymba-tune merge`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from hymba_tune.cli.screen import RichScreen, console, quiet_libraries
from hymba_tune.config import MergeConfig


def merge(
    run: Annotated[str, Parameter(name="RUN")],
    /,
    *,
    flags: Annotated[MergeConfig, Parameter(name="*")],
) -> None:
    """Fold a run's adapter into its base model, as one model under the released names.

    Example: hymba-tune merge runs/my-run --out my-model

    Parameters
    ----------
    run
        A run directory, or an adapter's folder.
    """
    from hymba_tune.adapters import merge_into

    quiet_libraries()
    flags.model = run
    with RichScreen().working("merging"):
        folder = merge_into(flags)
    console.print(f" merged into {folder}\n talk to it  hymba-tune chat {folder}", markup=False, soft_wrap=True)
