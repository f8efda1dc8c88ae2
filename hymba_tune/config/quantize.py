"""The settings of `hymba-tune quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from cyclopts import Group, Parameter
from pydantic import BeforeValidator, Field, model_validator

from hymba_tune.config.base import Names, Scheme
from hymba_tune.config.groups import RESULT
from hymba_tune.config.inference import ScoringOptions
from hymba_tune.config.options import CheckpointChoice, ModelOptions, OutputOptions


def _without_sign(value: Any) -> Any:
    """Accept ``1%`` for ``1``."""
    return value.removesuffix("%") if isinstance(value, str) else value


class QuantizeConfig(ScoringOptions, OutputOptions, ModelOptions, CheckpointChoice):
    """Settings of `hymba-tune quantize`."""

    group: ClassVar[Group] = RESULT

    model: Annotated[str, Parameter(parse=False)] = ""
    """The model or run."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the computation and of unquantized weights; auto keeps the base model's."""
    scheme: Scheme = Scheme.nf4
    """nf4 (4 bits; best), fp4 (4 bits), or int8."""
    skip: Names = Field(default_factory=list)
    """Further modules to leave unquantized, by the ends of their names: down_proj, layers.3.mamba.in_proj."""
    data: Names = Field(default_factory=lambda: ["demo"])
    """Data on which the damage is measured, as for sft --data. Default: demo (packaged)."""
    max_tokens: int = Field(default=8192, ge=1)
    """Tokens of --data to predict before and after quantizing (common: 4096 to 100000)."""
    search: bool = False
    """Measure the perplexity that each kind of module adds, and propose which to --skip so that it rises by at most
    --max-rise. Writes nothing without --out."""
    max_rise: Annotated[float, BeforeValidator(_without_sign)] = Field(default=1.0, ge=0, le=1000)
    """With --search: maximum rise of the perplexity in percent (common: 0.5 to 5)."""
    out: Path | None = None
    """Folder of the quantized model; must not exist or be empty. Default: exports/MODEL-SCHEME."""

    @model_validator(mode="after")
    def _check_rise(self) -> Self:
        if "max_rise" in self.model_fields_set and not self.search:
            raise ValueError("max_rise: it applies to --search only; add --search, or remove --max-rise")
        return self
