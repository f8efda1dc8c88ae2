"""`hymba-tune grpo`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from hymba_tune.cli.screen import loading
from hymba_tune.cli.settings import Recipe
from hymba_tune.cli.training import read_settings, run_verb
from hymba_tune.config import GRPOConfig


def grpo(*, config: Recipe = None, flags: Annotated[GRPOConfig, Parameter(name="*")] = GRPOConfig()) -> None:  # noqa: B008 (cyclopts reads the default)
    """Train a model from rewards of answers that it samples itself, compared with reference answers.

    Example: hymba-tune grpo --data problems.jsonl --reward gsm8k --model runs/my-run

    Rows are conversations as for sft; the last answer is the reference.

    Parameters
    ----------
    config
        A recipe: a YAML file with these settings, or the name of a packaged one. Flags win over it.
    """
    settings = read_settings(config, flags)
    with loading():
        from hymba_tune.train.grpo import run_grpo

    run_verb(settings, run_grpo)
