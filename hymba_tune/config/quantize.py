"""The settings of `hymba-tune quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from cyclopts import Group, Parameter
from pydantic import BeforeValidator, Field, model_validator

from hymba_tune.config.base import Names, Scheme
from hymba_tune.config.groups import RESULT
from hymba_tune.config.inference import ScoringOptions
from hymba_tune.config.options import ModelOptions, OutputOptions


def _without_sign(value: Any) -> Any:
    """``1%`` is ``1``."""
    return value.removesuffix("%") if isinstance(value, str) else value


class QuantizeConfig(ScoringOptions, OutputOptions, ModelOptions):
    """Storing a model's weights in fewer bits."""

    group: ClassVar[Group] = RESULT

    model: Annotated[str, Parameter(parse=False)] = ""
    """The model or run."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of what is not quantized, and of what is computed: auto keeps the base model's."""
    scheme: Scheme = Scheme.nf4
    """nf4 (4 bits; best), fp4 (4 bits), or int8."""
    skip: Names = Field(default_factory=list)
    """Modules to leave as they are beside those that always are, by the ends of their names: down_proj,
    layers.3.mamba.in_proj."""
    data: Names = Field(default_factory=lambda: ["demo"])
    """What the damage is measured on: as sft takes it. When not given: demo, which is packaged."""
    max_tokens: int = Field(default=8192, ge=1)
    """Tokens of --data that are predicted before and after (common: 4096 to 100000)."""
    search: bool = False
    """Measure what each kind of module adds to the perplexity, and say what to --skip so that it rises by no more than
    --max-rise. Nothing is written without --out."""
    max_rise: Annotated[float, BeforeValidator(_without_sign)] = Field(default=1.0, ge=0, le=1000)
    """With --search: per cent by which the perplexity may rise (common: 0.5 to 5)."""
    out: Path | None = None
    """Folder of the quantized model; must not exist or be empty. When not given: exports/MODEL-SCHEME."""

    @model_validator(mode="after")
    def _check_rise(self) -> Self:
        if "max_rise" in self.model_fields_set and not self.search:
            raise ValueError("max_rise: nothing is searched without --search")
        return self
