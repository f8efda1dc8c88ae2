"""The settings of `hymba-tune reward`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from cyclopts import Group
from pydantic import Field

from hymba_tune.config.base import Accuracy, Method, Verb
from hymba_tune.config.groups import FIRST, PREFERENCES
from hymba_tune.config.verbs import PreferenceConfig


class RewardConfig(PreferenceConfig):
    """Settings of `hymba-tune reward`: a model that scores texts, by the preferences of Bradley and Terry (1952)."""

    group: ClassVar[Group] = PREFERENCES

    verb: ClassVar[Verb] = Verb(
        "reward",
        "Reward model",
        loss_unit="",
        paired=True,
        logit_copies=0,
        accuracy=Accuracy("pairs", "ranked correctly", chance=0.5),
        scores=True,
        figures=("accuracy", "margin"),
    )
    learning_rates: ClassVar[Mapping[Method, float]] = {Method.lora: 1e-4, Method.dora: 1e-4, Method.full: 1e-5}
    center_rewards: Annotated[float, FIRST] = Field(default=0.0, ge=0)
    """Weight of a penalty on the squared sum of a pair's scores, which keeps scores around zero (common: 0.01)."""
    lr: Annotated[float | None, FIRST] = Field(default=None, gt=0)
    """Peak learning rate. Default: 1e-4 for an adapter, 1e-5 for full training, and up to 20 times that for models
    smaller than Hymba-1.5B."""
