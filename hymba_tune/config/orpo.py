"""The settings of `hymba-tune orpo`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Self

from cyclopts import Group
from pydantic import Field, model_validator

from hymba_tune.config.base import Accuracy, Method, Verb
from hymba_tune.config.groups import FIRST, PREFERENCES
from hymba_tune.config.verbs import PreferenceConfig


class ORPOConfig(PreferenceConfig):
    """Settings of `hymba-tune orpo`: odds ratio preference optimization (Hong et al. 2024)."""

    group: ClassVar[Group] = PREFERENCES

    verb: ClassVar[Verb] = Verb(
        "orpo",
        "Preference training (ORPO)",
        loss_unit="",
        paired=True,
        logit_copies=4,
        accuracy=Accuracy("pairs", "ranked correctly", chance=0.5),
        scores=False,
        figures=("accuracy", "margin"),
    )
    learning_rates: ClassVar[Mapping[Method, float]] = {Method.lora: 1e-4, Method.dora: 1e-4, Method.full: 8e-6}
    beta: Annotated[float, FIRST] = Field(default=0.1, gt=0)
    """Weight of the odds ratio, relative to the loss on the chosen answer; lambda in the paper (common: 0.1 to 1)."""
    lr: Annotated[float | None, FIRST] = Field(default=None, gt=0)
    """Peak learning rate. Default: 1e-4 for an adapter, 8e-6 for full training, and up to 20 times that for models
    smaller than Hymba-1.5B."""

    @model_validator(mode="after")
    def _check_offload(self) -> Self:
        if self.activation_offload:
            raise ValueError(
                "activation_offload: TRL's ORPO trainer keeps activations on the GPU; use --gradient-checkpointing"
            )
        return self
