"""The settings of `hymba-tune data` and its verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from cyclopts import Group, Parameter
from pydantic import Field

from hymba_tune.config.base import OnBadRow, Pairs
from hymba_tune.config.groups import RESULT
from hymba_tune.config.options import ModelChoice, OutputOptions, ReadingOptions


class DataCheckConfig(OutputOptions, ReadingOptions, ModelChoice):
    """Whether data can be trained on."""

    group: ClassVar[Group] = RESULT

    html: Path | None = None
    """Write the findings as a page, with plots, to this file."""


class DataPreviewConfig(ReadingOptions, ModelChoice):
    """Rows as the model reads them."""

    group: ClassVar[Group] = RESULT

    rows: Annotated[int, Field(ge=1), Parameter(name=("--rows", "-n"))] = 3
    """How many."""
    skip: int = Field(default=0, ge=0)
    """Rows to pass over first."""


class DataConvertConfig(OutputOptions):
    """Data in another format."""

    group: ClassVar[Group] = RESULT

    to: Literal["messages", "prompt-completion", "alpaca", "sharegpt", "text"]
    """The format to write."""
    out: Path
    """The file to write: .jsonl, .json, .csv, .tsv or .parquet, all but the last also with .gz."""
    map: Pairs = Field(default_factory=list)
    """Names of columns or roles that differ: --map prompt=question --map completion=answer --map role.bot=assistant."""
    on_bad_row: OnBadRow = OnBadRow.stop
    """stop at a row that cannot be used, or skip it and list it beside --out."""
    unique: bool = False
    """Leave out rows that say the same as an earlier one."""


class DataSplitConfig(OutputOptions):
    """Data in two parts."""

    group: ClassVar[Group] = RESULT

    eval: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the rows that is held out."""
    out: Path
    """The folder that train.jsonl and eval.jsonl are written to."""
    seed: int = Field(default=0, ge=0)
    """Seed of the choice."""
    map: Pairs = Field(default_factory=list)
    """Names of columns or roles that differ: --map prompt=question."""
    on_bad_row: OnBadRow = OnBadRow.stop
    """stop at a row that cannot be read, or leave it out."""
