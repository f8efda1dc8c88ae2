"""`hymba-tune distill capture`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from hymba_tune.cli.processes import capture_in_processes, settings_if_worker
from hymba_tune.cli.screen import RichScreen, console, loading, print_chosen_gpu, quiet_libraries
from hymba_tune.cli.settings import Recipe, check_first, combine
from hymba_tune.config import DistillCaptureConfig, DistillConfig
from hymba_tune.distributed.environment import is_main
from hymba_tune.formatting import format_bytes


def capture(
    *,
    config: Recipe = None,
    flags: Annotated[DistillCaptureConfig, Parameter(name="*")] = DistillCaptureConfig(),  # noqa: B008 (cyclopts reads the default)
) -> None:
    """Capture a teacher's targets for some data, so that later runs need no teacher in memory.

    The same command continues a pass that was interrupted, and --nproc shares it among GPUs. Machines that are given
    the same command with the same --teacher-cache, a folder that they share, fill it together.

    Example: hymba-tune distill capture --teacher llama-3.2-3b-instruct --data my.jsonl

    Parameters
    ----------
    config
        A recipe of distill: a YAML file with its settings, or the name of a packaged one. Flags win over it.
    """
    if (started := settings_if_worker(flags)) is not None:
        flags = started
    else:
        flags = _with_recipe(config, flags)
        check_first(flags)
        capture_in_processes("distill capture", flags, flags.device)
    with loading():
        from hymba_tune.distill.capture import run_capture
        from hymba_tune.train.screen import Screen

    quiet_libraries()
    print_chosen_gpu(flags.device)
    cache = run_capture(flags, RichScreen() if is_main() else Screen())
    if not is_main():
        return
    lines = [
        f"targets of {len(cache):,} rows are in {cache.folder}",
        f"{format_bytes(cache.bytes)}, {cache.bytes / max(cache.stats.known, 1):.0f} bytes a token",
        "next  hymba-tune distill with the same settings: the teacher is not loaded again",
    ]
    console.print(" " + "\n ".join(lines), markup=False, soft_wrap=True)


def _with_recipe(recipe: str | None, flags: DistillCaptureConfig) -> DistillCaptureConfig:
    """Return what a recipe of distill says about targets, overridden by the flags."""
    if recipe is None:
        return flags
    settings = combine(recipe, DistillConfig.model_validate(flags.given())).given()
    known = DistillCaptureConfig.model_fields
    return DistillCaptureConfig.model_validate({name: value for name, value in settings.items() if name in known})
