"""The data of a run: what is trained on, what is held out, and a few prompts to look at."""

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
from hymba_tune.data.report import DataReport
from hymba_tune.data.sources import Source
from hymba_tune.data.splitting import first_rows, rows_by_source, split_rows

if TYPE_CHECKING:  # importing transformers imports torch
    from transformers import PreTrainedTokenizerBase

Working = Callable[[str], AbstractContextManager[Callable[[int], None]]]
"""Shows what is being done; what it gives is called with the number of rows done."""
Sample = Callable[[Sequence[Source], int], list[tuple[Conversation, str]]]


@dataclass(frozen=True)
class TrainingData(Generic[D]):
    """Encoded rows, and a few prompts.

    Attributes:
        train: Rows to train on.
        held_out: Rows to evaluate on, source by source, if any.
        held_out_sources: How many of them are of each source, in their order.
        report: What became of the rows to train on.
        prompts: What comes before an answer, and that answer.
    """

    train: Dataset
    held_out: Dataset | None
    held_out_sources: dict[str, int]
    report: D
    prompts: list[tuple[Conversation, str]]


def read_training_data(
    options: KeptDataOptions, tokenizer: PreTrainedTokenizerBase, *, seed: int, prompts: int, working: Working
) -> TrainingData[DataReport]:
    """Read everything that ``--data`` and ``--eval-data`` name, as `build_dataset` does.

    Args:
        options: Which data, and how its rows are read.
        tokenizer: With the chat template that is asked for.
        seed: Of the rows that are drawn and held out.
        prompts: How many prompts to return: of the evaluation data, or else of the data.
        working: Told what is done.

    Raises:
        DataError: If data cannot be used; see `build_dataset`.
        ConfigError: If weights, caps or names do not fit the data.
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
    """Read everything that ``--data`` and ``--eval-data`` name as preferences, as `build_preferences` does.

    Args:
        options: As for `read_training_data`.
        tokenizer: As there.
        paired: Whether pairs are wanted, or judged answers.
        seed: As there, and of the order of judged answers.
        prompts: As there.
        working: As there.

    Raises:
        DataError: If data cannot be used; see `build_preferences`.
        ConfigError: If weights, caps or names do not fit the data.
    """
    build = partial(build_preferences, tokenizer=tokenizer, paired=paired, seed=seed, **_reading(options))
    sample = partial(sample_preferred, paired=paired)
    # Judged answers are taken in this order, and a batch should hold good and bad ones to different prompts.
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


def _reading(options: KeptDataOptions) -> dict[str, Any]:
    """How rows are read, whatever kind they are."""
    return {
        "max_length": options.max_length,
        "on_bad_row": options.on_bad_row,
        "cache_dir": cache_folder() if options.cache else None,
    }


def opened(options: DataOptions) -> tuple[list[Source], list[Source]]:
    """What ``--data`` names, and what is held out of its own: ``--eval-data``, or what comes with the data.

    Columns and roles of all of them are named as ``--map`` says, where a source does not say so itself. All of them
    are on this machine afterwards.

    Raises:
        DataError: If a source is not found, or is of no known kind.
        HubError: If the Hub cannot be reached or has no such dataset.
        ConfigError: If weights, caps or names do not fit the data.
    """
    sources = open_sources(options.data, options.weights, options.caps)
    given = open_sources(options.eval_data) or [source.held_out for source in sources if source.held_out]
    for source in (*sources, *given):
        source.download()  # before the first is read: that may take long
    mapping = as_mapping(options.map)

    def named(some: Sequence[Source]) -> list[Source]:
        return [replace(source, mapping={**mapping, **source.mapping}) for source in some]

    return named(sources), named(given)


def read_sources(
    options: DataOptions,
    sources: Sequence[Source],
    given: Sequence[Source],
    build: Callable[..., tuple[Dataset, D]],
    sample: Sample,
    *,
    seed: int,
    prompts: int,
    working: Working,
    doing: str = "reading",
    shuffled: bool = False,
) -> TrainingData[D]:
    """Read sources, and hold rows out: as many of each source in ``given``, or drawn where there is none.

    Args:
        options: How many are held out.
        sources: What is trained on.
        given: What is evaluated on.
        build: From sources to their rows, and the report on these.
        sample: From sources to some of their prompts.
        seed: Of the rows that are drawn and held out.
        prompts: How many prompts to return.
        working: Told what is done.
        doing: What that is called.
        shuffled: Whether the rows of a source are to be mixed.
    """
    with working(f"{doing} the data") as progress:
        rows, report = build(sources, progress=progress)
    held_out_of, counts, most = rows, report.sources, options.eval_max_rows
    train, held_out = split_rows(counts, 0 if given else options.eval_split, seed=seed, max_rows=most)
    if given:
        with working(f"{doing} the evaluation data") as progress:
            held_out_of, given_report = build(given, progress=progress)
        counts = given_report.sources
        held_out = first_rows(counts, most)
    held_out_sources = rows_by_source(counts, held_out)
    if shuffled:
        random, ends = np.random.default_rng(seed), np.cumsum(list(held_out_sources.values()))
        train = random.permutation(train)
        held_out = np.concatenate([random.permutation(part) for part in np.split(held_out, ends)])
    return TrainingData(
        rows.select(train),
        held_out_of.select(held_out) if len(held_out) else None,
        held_out_sources,
        report,
        sample(given or sources, prompts),
    )
