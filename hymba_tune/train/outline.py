"""The outline of a run, from its trainer or from its settings and data alone, without any weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow.compute as pc
import trl
from peft import PeftModel
from transformers import PreTrainedModel

from hymba_tune.train.arguments import by_size, learning_rates, run_steps
from hymba_tune.train.base import RunTrainer
from hymba_tune.train.optimizers import describe_groups, parameter_groups
from hymba_tune.train.setup import Data, Setup, lay_out

PACKING = "bfd"
"""TRL's name of the packing strategy: best fit, the longest first."""


@dataclass(frozen=True)
class Outline:
    """The outline of a run.

    Attributes:
        model: The model with its adapter; on the meta device if the weights are not loaded.
        steps: The number of optimizer steps.
        packed_share: The share of the packed rows that is filled with tokens; None where rows are not packed.
        groups: The parameter groups, as `describe_groups` describes them.
        by_size: The settings that the size of the model decides, by name.
    """

    model: PreTrainedModel | PeftModel
    steps: int
    packed_share: float | None
    groups: list[dict[str, Any]]
    by_size: dict[str, float]


def outline_of(setup: Setup, trainer: RunTrainer) -> Outline:
    """Return the outline of a run whose trainer is built and whose number of steps is set."""
    return Outline(
        trainer.model,
        trainer.args.max_steps,
        packed_share(trainer.train_dataset, trainer.args.max_length),
        describe_groups(trainer.parameter_groups()),
        by_size(setup, len(trainer.train_dataset)),
    )


def outline_without_weights(setup: Setup, data: Data) -> Outline:
    """Return the outline of a run from its settings and its data."""
    config = setup.config
    model = lay_out(config, setup.model_config, setup.weights_dtype, setup.added_tokens)
    rows = data.train
    if config.packing:
        with _without_progress_bars():
            rows = trl.pack_dataset(rows.select_columns(["input_ids"]), config.max_length, PACKING)
    groups = parameter_groups(model, learning_rates(setup), weight_decay=config.weight_decay, decayed=())
    return Outline(
        model,
        run_steps(setup, len(rows)),
        packed_share(rows, config.max_length),
        describe_groups(groups),
        by_size(setup, len(rows)),
    )


def packed_share(rows: datasets.Dataset, max_length: int) -> float | None:
    """Return the share of packed rows that is filled with tokens; None where rows are not packed."""
    if "seq_lengths" not in rows.column_names:
        return None
    tokens = pc.sum(pc.list_flatten(rows.data.column("seq_lengths"))).as_py()
    return float(tokens / (len(rows) * max_length))


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
