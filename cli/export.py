"""`hymba-tune export`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from hymba_tune.cli.screen import RichScreen, console, quiet_libraries, say_which_gpu
from hymba_tune.cli.settings import check_first
from hymba_tune.config import ExportConfig
from hymba_tune.formatting import format_bytes


def export(
    model: Annotated[str, Parameter(name="MODEL")],
    /,
    *,
    flags: Annotated[ExportConfig, Parameter(name="*")] = ExportConfig(),  # noqa: B008 (cyclopts reads the default)
) -> None:
    """Make a run or a model one that loads anywhere, check it, describe it, and publish it.

    Example: hymba-tune export runs/my-run --out my-model --push me/my-model --private

    The folder holds safetensors under the released names, tokenizer, settings, checksums and a model card. A folder
    exported before is uploaded as it is: hymba-tune export my-model --push me/my-model

    In fewer bits: hymba-tune export runs/my-run --quantize nf4 --out my-nf4

    Parameters
    ----------
    model
        A run directory, or whatever --model takes.
    """
    flags.model = model
    check_first(flags)
    from hymba_tune.hub import export as make

    quiet_libraries()
    say_which_gpu(flags.device)
    done = make(flags, RichScreen().working)
    lines = [("exported", f"{done.folder} ({format_bytes(done.size)})")]
    if done.note is not None:
        lines.append(("from", done.note))
    if done.difference is not None:
        lines.append(("checked", f"read again: logits differ by {done.difference:.2g} at most; SHA256SUMS"))
    if done.address is not None:
        lines.append(("uploaded", done.address))
    lines.append(("talk to it", f"hymba-tune chat {done.folder}"))
    for label, line in lines:
        console.print(f" {label:<11}{line}", markup=False, soft_wrap=True)
