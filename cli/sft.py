"""`hymba-tune sft`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from hymba_tune.cli.screen import loading
from hymba_tune.cli.settings import Recipe
from hymba_tune.cli.training import read_settings, run_verb
from hymba_tune.config import SFTConfig


def sft(*, config: Recipe = None, flags: Annotated[SFTConfig, Parameter(name="*")] = SFTConfig()) -> None:  # noqa: B008 (cyclopts reads the default)
    """Fine-tune a model on conversations or texts.

    Example: hymba-tune sft --data my.jsonl

    GSM8K's own columns: hymba-tune sft --data train.jsonl --map prompt=question --map completion=answer

    Parameters
    ----------
    config
        A recipe: a YAML file with these settings, or the name of a packaged one. Flags win over it.
    """
    settings = read_settings(config, flags)
    with loading():
        from hymba_tune.train.sft import run_sft

    run_verb(settings, run_sft)
