"""`hymba-tune dpo`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from hymba_tune.cli.screen import loading
from hymba_tune.cli.settings import Recipe
from hymba_tune.cli.training import read_settings, run_verb
from hymba_tune.config import DPOConfig


def dpo(*, config: Recipe = None, flags: Annotated[DPOConfig, Parameter(name="*")] = DPOConfig()) -> None:  # noqa: B008 (cyclopts reads the default)
    """Train a model to prefer the better of two answers.

    Example: hymba-tune dpo --data pairs.jsonl --model runs/my-sft

    Rows have prompt, chosen and rejected, as texts or messages; or two whole conversations that differ in their last
    answer.

    Parameters
    ----------
    config
        A recipe: a YAML file with these settings, or the name of a packaged one. Flags win over it.
    """
    settings = read_settings(config, flags)
    with loading():
        from hymba_tune.train.preference import run_dpo

    run_verb(settings, run_dpo)
