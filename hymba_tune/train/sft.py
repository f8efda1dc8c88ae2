"""Supervised fine-tuning."""

from __future__ import annotations

from typing import Any

import datasets
import trl
from transformers import PreTrainedModel, TrainerCallback

from hymba_tune.adapters import short_count
from hymba_tune.checkpoint import check_length
from hymba_tune.config import SFTConfig, as_mapping
from hymba_tune.data import DataReport, Source, build_dataset, open_sources, sample_prompts, split_dataset
from hymba_tune.train.flow import train
from hymba_tune.train.kind import Kind
from hymba_tune.train.run import Run
from hymba_tune.train.samples import SAMPLES
from hymba_tune.train.screen import Screen
from hymba_tune.train.setup import Data, Setup
from hymba_tune.train.trainer import HymbaTrainer


def run_sft(config: SFTConfig, screen: Screen) -> Run:
    """Fine-tune a model on conversations or texts; see `train`."""
    return train(config, Kind(_read_data, _make_trainer), screen)


def _read_data(setup: Setup, screen: Screen) -> Data:
    config = setup.config

    def encode(sources: list[Source], label: str) -> tuple[datasets.Dataset, DataReport]:
        with screen.working(label) as progress:
            return build_dataset(
                sources,
                setup.tokenizer,
                max_length=config.max_length,
                mapping=as_mapping(config.map),
                on_bad_row=config.on_bad_row,
                progress=progress,
            )

    sources = open_sources(config.data)
    # Some sources come with held-out data of their own.
    given = open_sources(config.eval_data) or [source.held_out for source in sources if source.held_out]
    train, report = encode(sources, "reading the data")
    held_out: datasets.Dataset | None
    if given:
        held_out, _ = encode(given, "reading the evaluation data")
        held_out = held_out.select(range(min(len(held_out), config.eval_max_rows)))
    else:
        train, held_out = split_dataset(train, config.eval_split, seed=config.seed, max_rows=config.eval_max_rows)
    prompts = sample_prompts(given or sources, SAMPLES, as_mapping(config.map))
    warning = check_length(report.longest, setup.model_config, strict=config.strict_length)
    summary = [
        f"{report.conversations + report.texts:,} {'conversations' if report.conversations else 'texts'}",
        f"{short_count(report.tokens)} tokens, {report.learned / report.tokens:.0%} learned",
    ]
    return Data(train, held_out, report, summary, prompts, warning)


def _make_trainer(
    setup: Setup, data: Data, model: PreTrainedModel, arguments: dict[str, Any], callbacks: list[TrainerCallback]
) -> HymbaTrainer:
    packing = setup.config.packing
    # Rows come encoded and cut; only packing is left to do.
    own = {"packing": packing, "packing_strategy": "bfd", "eval_packing": False}
    return HymbaTrainer(
        model=model,
        args=trl.SFTConfig(**arguments, **own, dataset_kwargs={"skip_prepare_dataset": not packing}),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=setup.tokenizer,
        callbacks=callbacks,
    )
