"""Preference training: pairs by DPO, single labeled answers by KTO."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

import trl
from transformers import PreTrainedModel, TrainerCallback

from hymba_tune.adapters import short_count
from hymba_tune.checkpoint import check_length
from hymba_tune.config import AdapterOptions, DPOConfig, KTOConfig, PreferenceConfig, Start
from hymba_tune.data import PreferenceReport, read_preferences
from hymba_tune.distributed.processes import first_of_node
from hymba_tune.errors import ConfigError
from hymba_tune.registry import find_local
from hymba_tune.train.flow import train
from hymba_tune.train.margin import MarginWatch
from hymba_tune.train.preference_trainers import PairTrainer, PreferenceTrainer, UnpairedTrainer
from hymba_tune.train.run import Run
from hymba_tune.train.samples import SAMPLES
from hymba_tune.train.screen import Screen
from hymba_tune.train.setup import Data, Setup

P = TypeVar("P", bound=PreferenceConfig)
D = TypeVar("D", DPOConfig, KTOConfig)


def run_dpo(config: DPOConfig, screen: Screen) -> Run | None:
    """Train a model to prefer the better answer of each pair; see `train`."""
    return train(PreferenceTask(_with_adapter_of_run(config), DPORun), screen)


def run_kto(config: KTOConfig, screen: Screen) -> Run | None:
    """Train a model towards answers labeled good and away from bad ones; see `train`."""
    return train(PreferenceTask(_with_adapter_of_run(config), KTORun), screen)


def _with_adapter_of_run(config: D) -> D:
    """Return the settings with those of the adapter that ``--start continue`` trains further.

    Raises:
        ConfigError: If there is no such adapter, or its settings differ from the given ones.
    """
    if config.start is not Start.continue_ or config.resume:
        return config
    source = find_local(config.model)
    if source is None or source.adapter is None or not (source.adapter.parent / "config.yaml").is_file():
        raise ConfigError(
            f"--start continue: {config.model} is not a run with an adapter to train further.",
            expected="--model runs/<name>",
            fix="--start merge",
        )
    saved = Run(source.adapter.parent).read_config()
    own = {name: getattr(saved, name) for name in AdapterOptions.model_fields}
    if fixed := [name for name in own.keys() & config.model_fields_set if own[name] != getattr(config, name)]:
        raise ConfigError(
            f"--start continue trains the adapter of {config.model} further; {', '.join(sorted(fixed))} cannot change.",
            fix="leave it out, or --start merge",
        )
    return config.model_copy(update=own)


@dataclass(frozen=True)
class PreferenceRun(ABC, Generic[P]):
    """A run of preference training whose rows are read. It needs only the model and the rows.

    Attributes:
        config: The run's settings.
        setup: The run's setup.
        data: The rows.
        report: The counts of rows that were read, used and dropped.
        screen: Shows the progress.
        extra_bytes: 0, as only the model and the rows are in memory.
    """

    config: P
    setup: Setup
    data: Data
    report: PreferenceReport
    screen: Screen
    extra_bytes: int = 0
    trainer: ClassVar[type[PreferenceTrainer]]

    @abstractmethod
    def arguments(self, shared: dict[str, Any]) -> Any:
        """Return the trainer's arguments, as TRL's class of them."""

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """Return the banner's lines on this kind of training."""

    def watches(self) -> list[TrainerCallback]:
        """Return callbacks of this kind of training."""
        return []

    def prepare(self, screen: Screen) -> Self:
        """Return the run itself."""
        del screen
        return self

    def make_trainer(
        self, model: PreTrainedModel, arguments: dict[str, Any], callbacks: list[TrainerCallback]
    ) -> PreferenceTrainer:
        """Build the trainer; see `hymba_tune.train.task.TrainerBuilder`."""
        # TRL disables dropout by default, even where the adapter has some.
        shared = {**arguments, "disable_dropout": not self.config.lora_dropout}
        return self.trainer(
            model=model,
            args=self.arguments(shared),
            train_dataset=self.data.train,
            eval_dataset=self.data.held_out,
            processing_class=self.setup.tokenizer,
            callbacks=[*callbacks, *self.watches()],
        )


@dataclass(frozen=True)
class PreferenceTask(Generic[P]):
    """Preference training; see `hymba_tune.train.task.TrainingTask`.

    Attributes:
        config: The run's settings.
        run: The kind of run.
    """

    config: P
    run: type[PreferenceRun[P]]

    def read_data(self, setup: Setup, screen: Screen) -> PreferenceRun[P]:
        """Read pairs, or single answers with labels."""
        config = self.config
        with first_of_node("reading the data"):
            data = read_preferences(
                config,
                setup.tokenizer,
                paired=config.verb.paired,
                seed=config.seed,
                prompts=0 if config.verb.scores else SAMPLES,
                working=screen.working,
            )
        report = data.report
        warning = check_length(report.longest, setup.model_config, strict=config.strict_length)
        summary = _summary(report)
        if not report.pairs and not (report.good and report.bad):
            kind = "good" if report.good else "bad"
            screen.note(f"every answer is labeled {kind}: KTO compares good answers with bad ones and needs both")
        rows = Data(data.train, data.held_out, data.held_out_sources, report, summary, data.prompts, warning)
        return self.run(config, setup, rows, report, screen)


def _summary(report: PreferenceReport) -> list[str]:
    answers = f"{report.good:,} good answers and {report.bad:,} bad ones"
    summary = [f"{report.pairs:,} pairs" if report.pairs else answers]
    summary.append(f"{short_count(report.tokens)} tokens, {report.learned / report.tokens:.0%} compared")
    if report.pairs:
        summary.append(f"the better answer is longer in {report.chosen_longer / report.pairs:.0%}")
    if report.ties:
        summary.append(f"{report.ties:,} ties")
    return summary


@dataclass(frozen=True)
class ReferenceRun(PreferenceRun[D]):
    """A run of preference training against a reference model."""

    def watches(self) -> list[TrainerCallback]:
        """Watch the margin of rewards, which is zero at the start."""
        return [MarginWatch(self.config.beta, self.report.identical / self.report.rows, self.screen)]

    def describe(self) -> dict[str, str]:
        """Return the banner's lines on where training starts and on the reference model."""
        config = self.config
        how = "computed once, before training" if config.precomputes else "computed with the new adapter off"
        reference = f"the model at the start, {how} · {config.loss} loss, beta {config.beta:g}"
        return describe_start(self.setup) | {"reference": reference}

    def reference_arguments(self) -> dict[str, Any]:
        """Return the arguments of TRL's trainers about the reference model."""
        return {"beta": self.config.beta, "precompute_ref_log_probs": self.config.precomputes}


@dataclass(frozen=True)
class DPORun(ReferenceRun[DPOConfig]):
    """A run of DPO."""

    trainer: ClassVar[type[PreferenceTrainer]] = PairTrainer

    def arguments(self, shared: dict[str, Any]) -> trl.DPOConfig:
        """Return the arguments of TRL's DPO trainer."""
        own = {"loss_type": [self.config.loss], "label_smoothing": self.config.label_smoothing}
        return trl.DPOConfig(**shared, **self.reference_arguments(), **own)


@dataclass(frozen=True)
class KTORun(ReferenceRun[KTOConfig]):
    """A run of KTO."""

    trainer: ClassVar[type[PreferenceTrainer]] = UnpairedTrainer

    def arguments(self, shared: dict[str, Any]) -> trl.KTOConfig:
        """Return the arguments of TRL's KTO trainer."""
        config = self.config
        weights = {"desirable_weight": config.desirable_weight, "undesirable_weight": config.undesirable_weight}
        return trl.KTOConfig(**shared, **self.reference_arguments(), loss_type=config.loss, **weights)


def describe_start(setup: Setup) -> dict[str, str]:
    """Return the banner's line on where training starts, if it starts from an adapter."""
    start = "its adapter is trained on" if setup.continues else "its adapter is merged in, a new one trained"
    return {"start": f"{setup.source.name}: {start}"} if setup.source.adapter else {}
