"""Reads the data of a run: training rows, held-out rows, and a few prompts for samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Generic

import numpy as np
from datasets import Dataset

from hymba_tune.config import DataOptions, KeptDataOptions, as_mapping
from hymba_tune.data.building import D
from hymba_tune.data.cache import cache_folder
from hymba_tune.data.dataset import build_dataset, sample_prompts
from hymba_tune.data.formats import Conversation
from hymba_tune.data.mixes import open_sources
from hymba_tune.data.preference_dataset import PreferenceReport, build_preferences, sample_preferred
from hymba_tune.data.prompt_dataset import PromptReport, build_prompts
from hymba_tune.data.report import DataReport
from hymba_tune.data.sources import Source
from hymba_tune.data.splitting import first_rows, rows_by_source, split_rows

if TYPE_CHECKING:  # importing transformers imports torch
    from transformers import PreTrainedTokenizerBase

Working = Callable[[str], AbstractContextManager[Callable[[int], None]]]
"""Shows what is being done; its context gives a function to call with the number of finished rows."""
Sample = Callable[[Sequence[Source], int], list[tuple[Conversation, str]]]


@dataclass(frozen=True)
class TrainingData(Generic[D]):
    """Encoded rows, and a few prompts.

    Attributes:
        train: Rows to train on.
        held_out: Rows to evaluate on, source by source, if any.
        held_out_sources: The number of held-out rows of each source, in their order.
        report: The report on the rows of ``--data``.
        prompts: Conversations up to an answer, each with that answer.
    """

    train: Dataset
    held_out: Dataset | None
    held_out_sources: dict[str, int]
    report: D
    prompts: list[tuple[Conversation, str]]


def read_training_data(
    options: KeptDataOptions, tokenizer: PreTrainedTokenizerBase, *, seed: int, prompts: int, working: Working
) -> TrainingData[DataReport]:
    """Encode the sources of ``--data`` and ``--eval-data`` with `build_dataset`.

    Args:
        options: Settings of the data.
        tokenizer: The tokenizer with the chat template to use.
        seed: Random seed of the rows that are drawn and held out.
        prompts: Number of prompts to return, of the evaluation data if there is any, else of the training data.
        working: Shows the progress.

    Raises:
        DataError: If the data cannot be used; see `build_dataset`.
        ConfigError: If weights, caps or names do not match the data.
    """
    build = partial(build_dataset, tokenizer=tokenizer, learn=options.learn, seed=seed, **_reading(options))
    return read_sources(options, *opened(options), build, sample_prompts, seed=seed, prompts=prompts, working=working)


def read_preferences(
    options: KeptDataOptions,
    tokenizer: PreTrainedTokenizerBase,
    *,
    paired: bool,
    seed: int,
    prompts: int,
    working: Working,
) -> TrainingData[PreferenceReport]:
    """Encode the sources of ``--data`` and ``--eval-data`` with `build_preferences`.

    Args:
        options: Settings of the data.
        tokenizer: The tokenizer with the chat template to use.
        paired: Whether to read pairs, or single answers with labels.
        seed: Random seed of the rows that are drawn and held out, and of the order of single answers.
        prompts: Number of prompts to return, of the evaluation data if there is any, else of the training data.
        working: Shows the progress.

    Raises:
        DataError: If the data cannot be used; see `build_preferences`.
        ConfigError: If weights, caps or names do not match the data.
    """
    build = partial(build_preferences, tokenizer=tokenizer, paired=paired, seed=seed, **_reading(options))
    sample = partial(sample_preferred, paired=paired)
    # The trainer takes single answers in this order, and a batch should hold good and bad ones to different prompts.
    return read_sources(
        options,
        *opened(options),
        build,
        sample,
        seed=seed,
        prompts=prompts,
        working=working,
        shuffled=not paired,
    )


def read_prompts(
    options: KeptDataOptions,
    tokenizer: PreTrainedTokenizerBase,
    *,
    longest: int,
    seed: int,
    prompts: int,
    working: Working,
) -> TrainingData[PromptReport]:
    """Encode the sources of ``--data`` and ``--eval-data`` with `build_prompts`.

    Args:
        options: Settings of the data.
        tokenizer: The tokenizer with the chat template to use.
        longest: Maximum tokens of a prompt.
        seed: Random seed of the rows that are drawn and held out.
        prompts: Number of prompts to return, of the evaluation data if there is any, else of the training data.
        working: Shows the progress.

    Raises:
        DataError: If the data cannot be used; see `build_prompts`.
        ConfigError: If weights, caps or names do not match the data.
    """
    build = partial(build_prompts, tokenizer=tokenizer, seed=seed, **_reading(options) | {"max_length": longest})
    return read_sources(options, *opened(options), build, sample_prompts, seed=seed, prompts=prompts, working=working)


def _reading(options: KeptDataOptions) -> dict[str, Any]:
    """Return the settings that all kinds of rows share."""
    return {
        "max_length": options.max_length,
        "on_bad_row": options.on_bad_row,
        "cache_dir": cache_folder() if options.cache else None,
    }


def opened(options: DataOptions) -> tuple[list[Source], list[Source]]:
    """Open the training sources and the evaluation sources, which are ``--eval-data`` or come with the training data.

    ``--map`` applies to all of them; a source's own mapping takes precedence. All of them are on this machine
    afterwards.

    Raises:
        DataError: If a source does not exist, or its file type is unknown.
        HubError: If the Hub cannot be reached or has no such dataset.
        ConfigError: If weights, caps or names do not match the data.
    """
    escape = options.escape_special_tokens
    sources = open_sources(options.data, options.weights, options.caps, escape=escape)
    eval_sources = open_sources(options.eval_data, escape=escape) or [
        source.held_out for source in sources if source.held_out
    ]
    for source in (*sources, *eval_sources):
        source.download()  # before the first is read, which may take long
    mapping = as_mapping(options.map)

    def with_mapping(unmapped: Sequence[Source]) -> list[Source]:
        return [replace(source, mapping={**mapping, **source.mapping}) for source in unmapped]

    return with_mapping(sources), with_mapping(eval_sources)


def read_sources(
    options: DataOptions,
    sources: Sequence[Source],
    eval_sources: Sequence[Source],
    build: Callable[..., tuple[Dataset, D]],
    sample: Sample,
    *,
    seed: int,
    prompts: int,
    working: Working,
    doing: str = "reading",
    shuffled: bool = False,
) -> TrainingData[D]:
    """Encode sources and hold rows out: the first rows of each evaluation source, or without one a random share.

    Args:
        options: Settings of the held-out data.
        sources: Training sources.
        eval_sources: Evaluation sources, if any.
        build: Encodes sources; returns their rows and the report on these.
        sample: Returns prompts of sources.
        seed: Random seed of the rows that are drawn and held out.
        prompts: Number of prompts to return.
        working: Shows the progress.
        doing: Name of the work, for the progress.
        shuffled: Whether to shuffle the rows of each source.
    """
    with working(f"{doing} the data") as progress:
        rows, report = build(sources, progress=progress)
    max_rows = options.eval_max_rows
    fraction = 0 if eval_sources else options.eval_split
    train, held_out = split_rows(report.sources, fraction, seed=seed, max_rows=max_rows)

    eval_rows = rows
    counts = report.sources
    if eval_sources:
        with working(f"{doing} the evaluation data") as progress:
            eval_rows, eval_report = build(eval_sources, progress=progress)
        counts = eval_report.sources
        held_out = first_rows(counts, max_rows)

    held_out_sources = rows_by_source(counts, held_out)
    if shuffled:
        random = np.random.default_rng(seed)
        train = random.permutation(train)
        ends = np.cumsum(list(held_out_sources.values()))
        held_out = np.concatenate([random.permutation(part) for part in np.split(held_out, ends)])

    return TrainingData(
        rows.select(train),
        eval_rows.select(held_out) if len(held_out) else None,
        held_out_sources,
        report,
        sample(eval_sources or sources, prompts),
    )
