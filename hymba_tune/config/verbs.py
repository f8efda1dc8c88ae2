"""The settings of each verb: the groups it takes, and its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from pydantic import Field, model_validator

from hymba_tune.config.base import Config, Method
from hymba_tune.config.options import AdapterOptions, DataOptions, EngineOptions, ModelOptions, TrainingOptions


class SFTConfig(TrainingOptions, AdapterOptions, DataOptions, EngineOptions, ModelOptions):
    """Supervised fine-tuning."""

    @model_validator(mode="after")
    def _check(self) -> SFTConfig:
        if self.method is Method.full and self.targets != ["all"]:
            raise ValueError("targets: --method full trains every weight; leave --targets out, or use lora or dora")
        if self.method is Method.dora and self.targets in (["attention"], ["ssm"]):
            raise ValueError(
                f"targets: {self.targets[0]} adapts only some rows of in_proj, and DoRA's magnitudes change every row; "
                "use --method lora, or --targets attention-ssm"
            )
        return self


class ChatConfig(EngineOptions, ModelOptions):
    """Talking to a model."""

    prompt: str | None = None
    """Answer this and end."""
    system: str | None = None
    """System prompt."""
    max_new_tokens: int = Field(default=512, ge=1)
    """Tokens an answer may have."""
    temperature: float = Field(default=0.7, ge=0)
    """0 takes the likeliest token each time."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Sample from the likeliest tokens that together have this probability."""
    seed: int | None = Field(default=None, ge=0)
    """Seed of the sampling."""


class MergeConfig(ModelOptions):
    """Folding an adapter into its base model."""

    model: Annotated[str, Parameter(parse=False)] = ""
    """The run."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the merged weights: auto keeps the base model's."""

    out: Path
    """Folder of the merged model; must not exist or be empty."""


class DoctorConfig(Config):
    """What this machine can do."""

    device: str = "auto"
    """The device to ask about: auto, cpu, cuda, cuda:1."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The number format to ask about."""
