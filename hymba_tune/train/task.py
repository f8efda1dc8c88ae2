"""The interface between one kind of training and what all kinds share, `hymba_tune.train.flow.train`.

A run has three stages, each an object with everything that the next one needs: the task, from its settings; the task
with its rows read; and what builds the trainer, once everything but the model is in memory.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from transformers import PreTrainedModel, TrainerCallback

from hymba_tune.config import TrainingConfig
from hymba_tune.train.base import RunTrainer
from hymba_tune.train.screen import Screen
from hymba_tune.train.setup import Data, Setup

C = TypeVar("C", bound=TrainingConfig, covariant=True)


class TrainingTask(Protocol[C]):
    """One kind of training, with the settings of one run."""

    @property
    def config(self) -> C:
        """The run's settings."""

    def read_data(self, setup: Setup, screen: Screen) -> TaskWithData:
        """Read and encode the data, before any weights are downloaded or loaded.

        Of several processes each one calls it; what is cached on disk is made once on each machine.

        Raises:
            HymbaTuneError: If the data cannot be used.
        """


class TaskWithData(Protocol):
    """A task whose rows are read."""

    @property
    def data(self) -> Data:
        """The rows."""

    @property
    def extra_bytes(self) -> int:
        """Bytes that this kind of training holds in addition to the model during training."""

    def prepare(self, screen: Screen) -> TrainerBuilder:
        """Load or compute what the trainer needs in addition to the model and the data; a dry run downloads nothing.

        Of several processes each one calls it, and they may share the work.

        Raises:
            HymbaTuneError: If a part of it cannot be used.
        """


class TrainerBuilder(Protocol):
    """What builds the trainer of a run."""

    def describe(self) -> dict[str, str]:
        """Return the lines of this kind of training in the banner and the report, by their labels."""

    def make_trainer(
        self, model: PreTrainedModel, arguments: dict[str, Any], callbacks: list[TrainerCallback]
    ) -> RunTrainer:
        """Build the trainer.

        Args:
            model: The model, with its adapter on.
            arguments: The arguments that all kinds share (`hymba_tune.train.arguments`), by TRL's names.
            callbacks: The callbacks of the run.
        """
