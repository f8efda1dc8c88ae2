"""The settings of `hymba-tune quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from pydantic import Field

from hymba_tune.config.answering import ScoringOptions
from hymba_tune.config.base import Names, Scheme
from hymba_tune.config.options import ModelOptions


class QuantizeConfig(ScoringOptions, ModelOptions):
    """Storing a model's weights in fewer bits."""

    model: Annotated[str, Parameter(parse=False)] = ""
    """The model or run."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of what is not quantised, and of what is computed: auto keeps the base model's."""
    scheme: Scheme = Scheme.nf4
    """nf4 (4 bits; best), fp4 (4 bits), or int8."""
    skip: Names = Field(default_factory=list)
    """Modules to leave as they are beside those that always are, by the ends of their names: down_proj,
    layers.3.mamba.in_proj."""
    data: Names = Field(default_factory=lambda: ["demo"])
    """What the damage is measured on: as sft takes it. When not given: demo, which is packaged."""
    max_tokens: int = Field(default=8192, ge=1)
    """Tokens of it that are predicted before and after (common: 4096 to 100000)."""
    out: Path | None = None
    """Folder of the quantised model; must not exist or be empty. When not given: exports/MODEL-SCHEME."""
