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
    """Settings of `hymba-tune data check`."""

    group: ClassVar[Group] = RESULT

    html: Path | None = None
    """Write the findings to this file as an HTML page with plots."""


class DataPreviewConfig(ReadingOptions, ModelChoice):
    """Settings of `hymba-tune data preview`."""

    group: ClassVar[Group] = RESULT

    rows: Annotated[int, Field(ge=1), Parameter(name=("--rows", "-n"))] = 3
    """Number of rows to show."""
    skip: int = Field(default=0, ge=0)
    """Number of rows to skip first."""


class DataConvertConfig(OutputOptions):
    """Settings of `hymba-tune data convert`."""

    group: ClassVar[Group] = RESULT

    to: Literal["messages", "prompt-completion", "alpaca", "sharegpt", "text"]
    """Format to write."""
    out: Path
    """File to write: .jsonl, .json, .csv or .tsv (each also with .gz), or .parquet."""
    map: Pairs = Field(default_factory=list)
    """Column and role names that differ: --map prompt=question --map completion=answer --map role.bot=assistant."""
    on_bad_row: OnBadRow = OnBadRow.stop
    """What to do with a row that cannot be used: stop, or skip it and list it in OUT.dropped.jsonl."""
    unique: bool = False
    """Leave out rows with the same content as an earlier row."""


class DataSplitConfig(OutputOptions):
    """Settings of `hymba-tune data split`."""

    group: ClassVar[Group] = RESULT

    eval: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the rows to hold out."""
    out: Path
    """Folder for train.jsonl and eval.jsonl."""
    seed: int = Field(default=0, ge=0)
    """Random seed of the split."""
    map: Pairs = Field(default_factory=list)
    """Column and role names that differ: --map prompt=question."""
    on_bad_row: OnBadRow = OnBadRow.stop
    """What to do with a row that cannot be read: stop, or skip it."""
