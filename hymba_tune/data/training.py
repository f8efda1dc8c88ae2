"""The data of a run: what is trained on, what is held out, and a few prompts to look at."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hymba_tune.config import DataOptions, as_mapping
from hymba_tune.data.cache import cache_folder
from hymba_tune.data.dataset import build_dataset, sample_prompts
from hymba_tune.data.formats import Conversation
from hymba_tune.data.mixes import open_sources
from hymba_tune.data.report import DataReport
from hymba_tune.data.sources import Source
from hymba_tune.data.splitting import split_dataset

Working = Callable[[str], AbstractContextManager[Callable[[int], None]]]
"""Shows what is being done; what it gives is called with the number of rows done."""


@dataclass(frozen=True)
class TrainingData:
    """Encoded rows as `build_dataset` gives them, the report on them, and prompts with the answers that are known."""

    train: Dataset
    held_out: Dataset | None
    report: DataReport
    prompts: list[tuple[Conversation, str]]


def read_training_data(
    options: DataOptions, tokenizer: PreTrainedTokenizerBase, *, seed: int, prompts: int, working: Working
) -> TrainingData:
    """Read everything that ``--data`` and ``--eval-data`` name.

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
    mapping = as_mapping(options.map)

    def encode(sources: list[Source], label: str) -> tuple[Dataset, DataReport]:
        with working(label) as progress:
            return build_dataset(
                sources,
                tokenizer,
                max_length=options.max_length,
                mapping=mapping,
                on_bad_row=options.on_bad_row,
                learn=options.learn,
                seed=seed,
                cache_dir=cache_folder() if options.cache else None,
                progress=progress,
            )

    sources = open_sources(options.data, options.weights, options.caps)
    # Some sources come with held-out data of their own.
    given = open_sources(options.eval_data) or [source.held_out for source in sources if source.held_out]
    encoded, report = encode(sources, "reading the data")
    train, held_out = split_dataset(
        encoded, 0 if given else options.eval_split, seed=seed, max_rows=options.eval_max_rows, sources=report.sources
    )
    if given:
        held_out, _ = encode(given, "reading the evaluation data")
        held_out = held_out.select(range(min(len(held_out), options.eval_max_rows)))
    return TrainingData(train, held_out, report, sample_prompts(given or sources, prompts, mapping))
