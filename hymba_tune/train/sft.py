"""Supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import trl
from transformers import PreTrainedModel, TrainerCallback

from hymba_tune.adapters import short_count
from hymba_tune.checkpoint import check_length
from hymba_tune.config import SFTConfig
from hymba_tune.data import DataReport, TrainingData, read_training_data
from hymba_tune.data.training import opened
from hymba_tune.distributed.processes import first_of_node
from hymba_tune.errors import ConfigError, command
from hymba_tune.evaluate.questions import Extraction, Question, check_questions
from hymba_tune.train.flow import train
from hymba_tune.train.outline import PACKING
from hymba_tune.train.run import Run
from hymba_tune.train.samples import SAMPLES
from hymba_tune.train.screen import Screen
from hymba_tune.train.setup import Data, Setup
from hymba_tune.train.trainer import HymbaTrainer


def run_sft(config: SFTConfig, screen: Screen) -> Run | None:
    """Fine-tune a model on conversations or texts; see `train`."""
    return train(SFTTask(config), screen)


@dataclass(frozen=True)
class SFTTask:
    """Supervised fine-tuning; see `hymba_tune.train.task.TrainingTask`."""

    config: SFTConfig

    def read_data(self, setup: Setup, screen: Screen) -> SFTRun:
        """Read conversations or texts."""
        config = self.config
        count = config.eval_max_rows if config.answers else SAMPLES
        with first_of_node("finding the data"):
            held_out = opened(config)[1] if config.answers else []
        if config.answers and not held_out:
            split = command("data", "split", config.data[0], "--eval", "0.1", "--out", "parts")
            raise ConfigError(
                "--answers: the prompts of held-out data are answered, and no held-out data is given.",
                expected="--eval-data, or data that comes with it",
                fix=f"{split}, then --data and --eval-data",
            )

        with first_of_node("reading the data"):
            data = read_training_data(config, setup.tokenizer, seed=config.seed, prompts=count, working=screen.working)
        if not config.answers:
            return SFTRun(setup, data_of(setup, data))
        extract = Extraction(config.answers, None)
        check_questions([Question(prompt, reference) for prompt, reference in data.prompts], extract, held_out)
        return SFTRun(setup, replace(data_of(setup, data), extract=extract))


@dataclass(frozen=True)
class SFTRun:
    """A run of supervised fine-tuning whose rows are read. It needs only the model and the rows.

    Attributes:
        setup: The run's setup.
        data: The rows.
        extra_bytes: 0, as only the model and the rows are in memory.
    """

    setup: Setup
    data: Data
    extra_bytes: int = 0

    def prepare(self, screen: Screen) -> SFTRun:
        """Return the run itself."""
        del screen
        return self

    def describe(self) -> dict[str, str]:
        """Return no lines of its own."""
        return {}

    def make_trainer(
        self, model: PreTrainedModel, arguments: dict[str, Any], callbacks: list[TrainerCallback]
    ) -> HymbaTrainer:
        """Build the trainer; see `hymba_tune.train.task.TrainerBuilder`."""
        packing = self.setup.config.packing
        # Rows are already encoded and cut; only packing is left to the trainer.
        own = {"packing": packing, "packing_strategy": PACKING, "eval_packing": False}
        return HymbaTrainer(
            model=model,
            args=trl.SFTConfig(**arguments, **own, dataset_kwargs={"skip_prepare_dataset": not packing}),
            train_dataset=self.data.train,
            eval_dataset=self.data.held_out,
            processing_class=self.setup.tokenizer,
            callbacks=callbacks,
        )


def data_of(setup: Setup, data: TrainingData[DataReport]) -> Data:
    """Return the rows that a run trains on, with their amount in words."""
    report = data.report
    warning = check_length(report.longest, setup.model_config, strict=setup.config.strict_length)
    summary = [
        f"{report.conversations + report.texts:,} {'conversations' if report.conversations else 'texts'}",
        f"{short_count(report.tokens)} tokens, {report.learned / report.tokens:.0%} learned",
    ]
    return Data(data.train, data.held_out, data.held_out_sources, report, summary, data.prompts, warning)
