"""Every setting of every verb, with its default, its range and its help line. Each default stands here once.

A field is a flag (`--max-length`), a recipe key (`max_length`) and an environment variable
(`HYMBA_TUNE_SFT_MAX_LENGTH`); a flag wins over the environment, which wins over a recipe.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Names = Annotated[list[str], Parameter(negative="", consume_multiple=True, show_default=False)]


def _written_as_pairs(value: Any) -> Any:
    """Recipes may write a mapping."""
    return [f"{name}={choice}" for name, choice in value.items()] if isinstance(value, dict) else value


def _checked_pairs(value: list[str]) -> list[str]:
    if wrong := [pair for pair in value if not all(pair.partition("="))]:
        raise ValueError(f"{wrong[0]!r} is not a pair such as name=value")
    return value


Pairs = Annotated[Names, BeforeValidator(_written_as_pairs), AfterValidator(_checked_pairs)]


class Method(StrEnum):
    """How the weights are trained."""

    lora = "lora"
    dora = "dora"
    full = "full"


class MetaTokens(StrEnum):
    """How the meta tokens are trained beside an adapter."""

    lora = "lora"
    full = "full"
    frozen = "frozen"


class OnBadRow(StrEnum):
    """What happens at a row that cannot be used."""

    stop = "stop"
    skip = "skip"


def as_mapping(pairs: Pairs) -> dict[str, str]:
    """Pairs such as ``prompt=question`` by their first halves."""
    return dict(pair.split("=", 1) for pair in pairs)


class Config(BaseModel):
    """The base of all settings: unknown keys are errors and values are checked also when assigned."""

    @classmethod
    def kinds(cls) -> Iterator[type[Config]]:
        """Every kind of settings there is."""
        for kind in cls.__subclasses__():
            yield kind
            yield from kind.kinds()

    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True)


class ModelOptions(Config):
    """Which model, and in which number format."""

    model: str = "nvidia/Hymba-1.5B-Base"
    """A Hub id, an alias (hymba-1.5b, hymba-1.5b-instruct, hymba-nano), a folder, or a run directory."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights: auto takes bfloat16 where the device computes in it, else float32."""
    device: str = "auto"
    """auto takes the first CUDA device, else the CPU. Or: cpu, cuda, cuda:1."""


class EngineOptions(Config):
    """How the model computes."""

    kernels: Pairs = Field(default_factory=list)
    """Ways to compute, instead of the fastest: --kernels scan=torch attention=sdpa (see hymba-tune doctor)."""
    strict_length: bool = False
    """Refuse texts longer than the model was made for (max_position_embeddings), which otherwise get a warning."""


class DataOptions(Config):
    """Which data, and how its rows are read."""

    data: Names = Field(default_factory=list)
    """JSONL, JSON, CSV or Parquet files, a Hub dataset id, or demo (packaged)."""
    eval_data: Names = Field(default_factory=list)
    """Held-out data in the same formats; without it, a split of --data is held out."""
    eval_split: Fraction = 0.05
    """Share of --data that is held out when there is no --eval-data; 0 trains on everything."""
    eval_max_rows: int = Field(default=500, ge=1)
    """Rows the held-out data is cut to, so that an evaluation stays short."""
    map: Pairs = Field(default_factory=list)
    """Names of columns or roles that differ: --map prompt=question --map completion=answer --map role.bot=assistant."""
    on_bad_row: OnBadRow = OnBadRow.stop
    """stop at a row that cannot be used, or skip it and list it in dropped.jsonl."""
    max_length: int = Field(default=2048, ge=8)
    """Tokens a row is cut to (common: 512 to 8192)."""
    packing: bool = False
    """Fill every row to --max-length with whole documents, none of which sees another: steps of even size. Padding
    costs nothing here, packed or not."""


class AdapterOptions(Config):
    """What is trained."""

    method: Method = Method.lora
    """lora, dora (LoRA with learned magnitudes), or full (every weight)."""
    rank: int = Field(default=16, ge=1)
    """Rank of the adapter (common: 8 to 64)."""
    alpha: float | None = Field(default=None, gt=0)
    """LoRA's alpha; the update is scaled by alpha / rank. Twice the rank when not given."""
    lora_dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    rslora: bool = False
    """Scale the update by alpha / sqrt(rank) instead."""
    targets: Names = Field(default_factory=lambda: ["all"])
    """A preset (all, attention-ssm, attention, ssm, mlp) or module names such as in_proj and x_proj.0."""
    meta_tokens: MetaTokens = MetaTokens.lora
    """How the meta tokens are trained beside an adapter: lora, full or frozen."""


class TrainingOptions(Config):
    """How long, how fast, and where to."""

    epochs: float = Field(default=1.0, gt=0)
    """Passes over the data, unless --steps is given."""
    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(default=8, ge=1)
    """Rows a device computes at a time."""
    grad_accum: int = Field(default=1, ge=1)
    """Batches whose gradients are added up before a step."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate. When not given: 2e-4 for an adapter, 2e-5 for full training."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: Fraction = 0.03
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients of a larger norm are scaled down to it."""
    gradient_checkpointing: bool = False
    """Compute activations again instead of keeping them: less memory, about a third more time."""
    seed: int = Field(default=0, ge=0)
    """Seed of the data order, the adapter and dropout."""
    log_every: int = Field(default=10, ge=1)
    """Steps between two rows of the table."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between two evaluations. When not given: five times a run."""
    save_every: int | None = Field(default=None, ge=1)
    """Steps between two checkpoints. When not given: with each evaluation."""
    out: Path | None = None
    """Run directory. When not given: runs/MODEL-DATA-TIME."""
    resume: Path | None = None
    """Run directory to go on with, from its last whole checkpoint."""


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
