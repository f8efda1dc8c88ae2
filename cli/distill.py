"""`hymba-tune distill` and its verbs."""

from __future__ import annotations

from typing import Annotated

from cyclopts import App, Parameter

from hymba_tune.cli.distill_capture import capture
from hymba_tune.cli.screen import HELP_FLAGS, loading
from hymba_tune.cli.settings import Recipe
from hymba_tune.cli.training import read_settings, run_verb
from hymba_tune.config import DistillConfig

distill = App(
    name="distill",
    help_flags=HELP_FLAGS,
    help="Distill a teacher into a model; the two tokenizers may differ.\n\n"
    "Example: hymba-tune distill --teacher llama-3.2-3b-instruct --data my.jsonl",
)


@distill.default
def train(*, config: Recipe = None, flags: Annotated[DistillConfig, Parameter(name="*")] = DistillConfig()) -> None:  # noqa: B008 (cyclopts reads the default)
    """Distill a teacher into a model; the two tokenizers may differ.

    Example: hymba-tune distill --teacher llama-3.2-3b-instruct --data my.jsonl

    Parameters
    ----------
    config
        A recipe: a YAML file with these settings, or the name of a packaged one. Flags win over it.
    """
    settings = read_settings(config, flags)
    with loading():
        from hymba_tune.distill.run import run_distill

    run_verb(settings, run_distill)


distill.command(capture)
