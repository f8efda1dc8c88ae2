"""The seam between one kind of training and what all of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from hymba_tune.train.base import RunTrainer
from hymba_tune.train.screen import Screen
from hymba_tune.train.setup import Data, Setup


@dataclass(frozen=True)
class TrainingTask:
    """What one kind of training has of its own; `hymba_tune.train.flow.train` is the rest.

    Attributes:
        read_data: Reads and encodes the data, before any weights are downloaded or loaded.
        make_trainer: Builds the trainer of a model with its adapter on. The arguments are those that every kind of
            training shares (`hymba_tune.train.arguments`), by TRL's names; the callbacks are the run's.
        describe: What the banner and the report say of this kind alone, a label and a line each.
        extra_bytes: Bytes that it holds beside the model while that is trained.
        prepare: Gets ready what the trainer needs beside the model and the data, once both are known to be usable. In a
            dry run it downloads nothing.
    """

    read_data: Callable[[Setup, Screen], Data]
    make_trainer: Callable[[Setup, Data, PreTrainedModel, dict[str, Any], list[TrainerCallback]], RunTrainer]
    describe: Callable[[Setup], dict[str, str]] = lambda _: {}
    extra_bytes: Callable[[Setup], int] = lambda _: 0
    prepare: Callable[[Setup, Screen], None] = lambda *_: None
