"""`hymba-tune kto`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from hymba_tune.cli.screen import loading
from hymba_tune.cli.settings import Recipe
from hymba_tune.cli.training import read_settings, run_verb
from hymba_tune.config import KTOConfig


def kto(*, config: Recipe = None, flags: Annotated[KTOConfig, Parameter(name="*")] = KTOConfig()) -> None:  # noqa: B008 (cyclopts reads the default)
    """Train a model on single answers that are labeled good or bad.

    Example: hymba-tune kto --data labeled.jsonl --model runs/my-sft

    Rows have prompt, completion and label (true or false). A pair, as for hymba-tune dpo, counts as two answers.

    Parameters
    ----------
    config
        A recipe: a YAML file with these settings, or the name of a packaged one. Flags win over it.
    """
    settings = read_settings(config, flags)
    with loading():
        from hymba_tune.train.preference import run_kto

    run_verb(settings, run_kto)
