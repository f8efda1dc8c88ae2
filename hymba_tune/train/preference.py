"""Training on preferences: pairs by DPO, answers judged one by one by KTO."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar, cast

import trl
from transformers import PreTrainedModel, TrainerCallback

from hymba_tune.adapters import short_count
from hymba_tune.checkpoint import check_length
from hymba_tune.config import AdapterOptions, DPOConfig, KTOConfig, PreferenceConfig, Start
from hymba_tune.data import PreferenceReport, read_preferences
from hymba_tune.errors import ConfigError
from hymba_tune.registry import find_local
from hymba_tune.train.flow import train
from hymba_tune.train.margin import MarginWatch
from hymba_tune.train.preference_trainers import PairTrainer, UnpairedTrainer
from hymba_tune.train.run import Run
from hymba_tune.train.samples import SAMPLES
from hymba_tune.train.screen import Screen
from hymba_tune.train.setup import Data, Setup
from hymba_tune.train.task import TrainingTask

P = TypeVar("P", bound=PreferenceConfig)


def run_dpo(config: DPOConfig, screen: Screen) -> Run | None:
    """Train a model to prefer the better answer of each pair; see `train`."""
    return train(
        _with_adapter_of_run(config), TrainingTask(_read_data, partial(_pair_trainer, screen), _describe), screen
    )


def run_kto(config: KTOConfig, screen: Screen) -> Run | None:
    """Train a model towards answers judged good and away from bad ones; see `train`."""
    return train(
        _with_adapter_of_run(config), TrainingTask(_read_data, partial(_judged_trainer, screen), _describe), screen
    )


def _with_adapter_of_run(config: P) -> P:
    """The settings with those of the adapter that ``--start continue`` goes on with.

    Raises:
        ConfigError: If there is no such adapter, or other settings are asked for.
    """
    if config.start is not Start.continue_ or config.resume:
        return config
    source = find_local(config.model)
    if source is None or source.adapter is None or not (source.adapter.parent / "config.yaml").is_file():
        raise ConfigError(
            f"--start continue: {config.model} is no run with an adapter to go on training.",
            expected="--model runs/<name>",
            fix="--start merge",
        )
    saved = Run(source.adapter.parent).read_config()
    own = {name: getattr(saved, name) for name in AdapterOptions.model_fields}
    if fixed := [name for name in own.keys() & config.model_fields_set if own[name] != getattr(config, name)]:
        raise ConfigError(
            f"--start continue goes on with the adapter of {config.model}; {', '.join(sorted(fixed))} cannot change.",
            fix="leave it out, or --start merge",
        )
    return config.model_copy(update=own)


def _read_data(setup: Setup, screen: Screen) -> Data:
    config = setup.config
    assert isinstance(config, PreferenceConfig)
    data = read_preferences(
        config,
        setup.tokenizer,
        paired=config.verb.paired,
        seed=config.seed,
        prompts=SAMPLES,
        working=screen.working,
    )
    report = data.report
    warning = check_length(report.longest, setup.model_config, strict=config.strict_length)
    return Data(data.train, data.held_out, data.held_out_sources, report, _summary(report), data.prompts, warning)


def _summary(report: PreferenceReport) -> list[str]:
    judged = f"{report.good:,} good answers and {report.bad:,} bad ones"
    summary = [f"{report.pairs:,} pairs" if report.pairs else judged]
    summary.append(f"{short_count(report.tokens)} tokens, {report.learned / report.tokens:.0%} compared")
    if report.pairs:
        summary.append(f"the better answer is longer in {report.chosen_longer / report.pairs:.0%}")
    if report.ties:
        summary.append(f"{report.ties:,} ties")
    return summary


def _describe(setup: Setup) -> dict[str, str]:
    """The banner's lines on where training starts and what it is compared with."""
    config = cast(DPOConfig | KTOConfig, setup.config)
    start = "its adapter is trained on" if setup.continues else "its adapter is merged in, a new one trained"
    how = "computed once, before training" if config.precomputes else "computed with the new adapter off"
    lines = {"start": f"{setup.source.name}: {start}"} if setup.source.adapter else {}
    return lines | {"reference": f"the model at the start, {how} · {config.loss} loss, beta {config.beta:g}"}


def _arguments(setup: Setup, arguments: dict[str, Any]) -> dict[str, Any]:
    config = cast(PreferenceConfig, setup.config)
    own = {"beta": config.beta, "precompute_ref_log_probs": config.precomputes}
    # TRL switches dropout off unless told otherwise, also where it was asked for.
    return {**arguments, **own, "disable_dropout": not config.lora_dropout}


def _margin_watch(setup: Setup, data: Data, screen: Screen) -> MarginWatch:
    config, report = cast(PreferenceConfig, setup.config), cast(PreferenceReport, data.report)
    return MarginWatch(config.beta, report.identical / report.rows, screen)


def _pair_trainer(
    screen: Screen,
    setup: Setup,
    data: Data,
    model: PreTrainedModel,
    arguments: dict[str, Any],
    callbacks: list[TrainerCallback],
) -> PairTrainer:
    config = cast(DPOConfig, setup.config)
    own = {"loss_type": [config.loss], "label_smoothing": config.label_smoothing}
    return PairTrainer(
        model=model,
        args=trl.DPOConfig(**_arguments(setup, arguments), **own),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=setup.tokenizer,
        callbacks=[*callbacks, _margin_watch(setup, data, screen)],
    )


def _judged_trainer(
    screen: Screen,
    setup: Setup,
    data: Data,
    model: PreTrainedModel,
    arguments: dict[str, Any],
    callbacks: list[TrainerCallback],
) -> UnpairedTrainer:
    config = cast(KTOConfig, setup.config)
    weights = {"desirable_weight": config.desirable_weight, "undesirable_weight": config.undesirable_weight}
    return UnpairedTrainer(
        model=model,
        args=trl.KTOConfig(**_arguments(setup, arguments), loss_type=config.loss, **weights),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=setup.tokenizer,
        callbacks=[*callbacks, _margin_watch(setup, data, screen)],
    )
