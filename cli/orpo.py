"""`hymba-tune orpo`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from hymba_tune.cli.screen import loading
from hymba_tune.cli.settings import Recipe
from hymba_tune.cli.training import read_settings, run_verb
from hymba_tune.config import ORPOConfig


def orpo(*, config: Recipe = None, flags: Annotated[ORPOConfig, Parameter(name="*")] = ORPOConfig()) -> None:  # noqa: B008 (cyclopts reads the default)
    """Train a model on pairs of a better and a worse answer, without a reference model.

    Example: hymba-tune orpo --data pairs.jsonl

    Rows have prompt, chosen and rejected, as texts or messages; or two whole conversations that differ in their last
    answer.

    Parameters
    ----------
    config
        A recipe: a YAML file with these settings, or the name of a packaged one. Flags win over it.
    """
    settings = read_settings(config, flags)
    with loading():
        from hymba_tune.train.orpo import run_orpo

    run_verb(settings, run_orpo)
