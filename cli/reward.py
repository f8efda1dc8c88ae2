"""`hymba-tune reward`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from hymba_tune.cli.screen import loading
from hymba_tune.cli.settings import Recipe
from hymba_tune.cli.training import read_settings, run_verb
from hymba_tune.config import RewardConfig


def reward(*, config: Recipe = None, flags: Annotated[RewardConfig, Parameter(name="*")] = RewardConfig()) -> None:  # noqa: B008 (cyclopts reads the default)
    """Train a reward model: it scores texts, and learns from pairs of a better and a worse answer.

    Example: hymba-tune reward --data pairs.jsonl --model my-model

    Rows have prompt, chosen and rejected, as texts or messages; or two whole conversations that differ in their last
    answer. The result loads with transformers and PEFT; the verbs of the kit that write do not take it.

    Parameters
    ----------
    config
        A recipe: a YAML file with these settings, or the name of a packaged one. Flags win over it.
    """
    settings = read_settings(config, flags)
    with loading():
        from hymba_tune.train.reward import run_reward

    run_verb(settings, run_reward)
