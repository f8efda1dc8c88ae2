"""`hymba-tune merge`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from hymba_tune.cli.screen import RichScreen, console, loading, print_chosen_gpu, quiet_libraries
from hymba_tune.cli.settings import check_first
from hymba_tune.config import MergeConfig, Onto
from hymba_tune.errors import command
from hymba_tune.formatting import format_bytes

if TYPE_CHECKING:
    from hymba_tune.hub import Merged


def merge(
    run: Annotated[str, Parameter(name="RUN")],
    /,
    *,
    flags: Annotated[MergeConfig, Parameter(name="*")],
) -> None:
    """Merge a run's adapter into its base model, as one model with the released tensor names.

    Example: hymba-tune merge runs/my-run --out my-model

    A run on quantized weights: hymba-tune merge runs/my-run --onto original --out my-model

    Parameters
    ----------
    run
        A run directory, or an adapter's folder.
    """
    flags.model = run
    check_first(flags)
    with loading():
        from hymba_tune.hub import merge as merge_model

    quiet_libraries()
    print_chosen_gpu(flags.device)
    done = merge_model(flags, RichScreen().working)
    lines = [
        ("merged", f"{done.folder} ({format_bytes(done.size)})"),
        *_drifts(done),
        *([("beware", done.change)] if done.change else []),
        ("chat with it", command("chat", done.folder)),
    ]
    for label, line in lines:
        console.print(f" {label:<14}{line}", markup=False, soft_wrap=True)


def _drifts(done: Merged) -> list[tuple[str, str]]:
    """Describe the base of the merge, the alternative, and the distance of both from the trained model."""
    if done.base is None:
        unknown = "the original weights: an adapter without its run does not say whether they were quantized"
        return [("onto", unknown)] if done.alone else []
    bases = {Onto.original: "the original weights", Onto.dequantized: f"{done.base.scheme} weights, dequantized"}
    lines = [
        (
            "onto" if onto is done.onto else "not onto",
            f"{bases[onto]}: KL {drift.divergence:.2g}, logits within {drift.largest:.2g} of the trained model's",
        )
        for onto, drift in sorted(done.drifts.items(), key=lambda entry: entry[0] is not done.onto)
    ]
    nearest = min(done.drifts, key=lambda onto: done.drifts[onto].divergence)
    if nearest is not done.onto:
        lines.append(("advised", f"--onto {nearest}: closer to the trained model"))
    return lines
