"""`hymba-tune export`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from hymba_tune.cli.screen import RichScreen, console, loading, print_chosen_gpu, quiet_libraries
from hymba_tune.cli.settings import check_first
from hymba_tune.config import ExportConfig
from hymba_tune.errors import command
from hymba_tune.formatting import format_bytes


def export(
    model: Annotated[str, Parameter(name="MODEL")],
    /,
    *,
    flags: Annotated[ExportConfig, Parameter(name="*")] = ExportConfig(),  # noqa: B008 (cyclopts reads the default)
) -> None:
    """Export a run or a model for any library, check it, write its model card, and publish it.

    Example: hymba-tune export runs/my-run --out my-model --push me/my-model --private

    The folder holds safetensors with the released tensor names, tokenizer, settings, checksums and a model card. An
    exported folder is uploaded as it is: hymba-tune export my-model --push me/my-model

    Quantized: hymba-tune export runs/my-run --quantize nf4 --out my-nf4

    Parameters
    ----------
    model
        A run directory, or any model that --model accepts.
    """
    flags.model = model
    check_first(flags)
    with loading():
        from hymba_tune.hub import export as export_model

    quiet_libraries()
    print_chosen_gpu(flags.device)
    done = export_model(flags, RichScreen().working)
    lines = [("exported", f"{done.folder} ({format_bytes(done.size)})")]
    if done.note is not None:
        lines.append(("from", done.note))
    if done.difference is not None:
        lines.append(("checked", f"loaded again: logits differ by at most {done.difference:.2g}; SHA256SUMS"))
    if done.address is not None:
        lines.append(("uploaded", done.address))
    lines.append(("chat with it", command("chat", done.folder)))
    for label, line in lines:
        console.print(f" {label:<14}{line}", markup=False, soft_wrap=True)
