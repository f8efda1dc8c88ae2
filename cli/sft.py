"""`hymba-tune sft`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.text import Text

from hymba_tune.cli.screen import RichScreen, console
from hymba_tune.cli.settings import combine
from hymba_tune.config import SFTConfig

if TYPE_CHECKING:
    from hymba_tune.train.run import Run


def sft(*, config: str | None = None, flags: Annotated[SFTConfig, Parameter(name="*")] = SFTConfig()) -> None:  # noqa: B008 (cyclopts reads the default)
    """Fine-tune a model on conversations or texts.

    Example: hymba-tune sft --data my.jsonl

    GSM8K's own columns: hymba-tune sft --data train.jsonl --map prompt=question --map completion=answer

    Parameters
    ----------
    config
        A recipe: a YAML file with these settings, or the name of a packaged one. Flags win over it.
    """
    from hymba_tune.train.sft import resume_config, run_sft

    settings = combine(config, flags)
    if settings.resume:
        settings = resume_config(settings)
    try:
        run = run_sft(settings, RichScreen())
    except KeyboardInterrupt as interrupt:
        if interrupt.args:
            console.print(f"\n stopped and saved; to go on: hymba-tune sft --resume {interrupt.args[0]}", markup=False)
        raise
    _show_result(run)


def _show_result(run: Run) -> None:
    evaluations = list(run.evaluations())
    console.print()
    if len(evaluations) > 1:
        first, best = evaluations[0], min(evaluations, key=lambda row: row.eval_loss or 0.0)
        console.print(f" held-out loss  {first.eval_loss:.3f} → {best.eval_loss:.3f} (step {best.step})", markup=False)
    samples = json.loads((run.path / "samples.json").read_text(encoding="utf-8"))
    if samples:
        for label, style in (("prompt", "dim"), ("before", "dim"), ("after", "")):
            console.print(Text(f" {label:<8}", style="dim").append(samples[0][label], style=style))
    lines = [f"everything is in {run.path}", f"talk to it       hymba-tune chat {run.path}"]
    if run.adapter.is_dir():
        lines.append(f"one model of it  hymba-tune merge {run.path} --out {run.name}-merged")
    console.print("\n " + "\n ".join(lines), markup=False, soft_wrap=True)
