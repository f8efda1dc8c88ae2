"""Encodes sources of conversations as prompts with references: answers to them are sampled, and get rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from datasets import Dataset

from hymba_tune.config import Learn, OnBadRow
from hymba_tune.data.building import IDS, RowSchema, build
from hymba_tune.data.chat import encode_prompt
from hymba_tune.data.dataset import before_last_answer
from hymba_tune.data.encoding import ExampleReading, readings
from hymba_tune.data.formats import Conversation
from hymba_tune.data.report import DataReport
from hymba_tune.data.sources import Source
from hymba_tune.errors import DataError

if TYPE_CHECKING:  # importing transformers imports torch
    from transformers import PreTrainedTokenizerBase


@dataclass
class PromptReport(DataReport):
    """The report on prompts. ``learned`` counts the tokens of the references, which are only compared with.

    Attributes:
        prompts: Encoded prompts.
    """

    prompts: int = 0


def build_prompts(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    mapping: Mapping[str, str] | None = None,
    on_bad_row: OnBadRow = OnBadRow.stop,
    seed: int = 0,
    cache_dir: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Dataset, PromptReport]:
    """Encode the prompts of the sources, each a conversation up to its last answer.

    Args:
        sources: The sources, read one after the other.
        tokenizer: A tokenizer with a chat template.
        max_length: Maximum tokens of a prompt. Rows with longer ones are dropped.
        mapping: Column and role names, as for `Names.parse`.
        on_bad_row: Whether the first row that cannot be used raises an error, or is listed in the report.
        seed: Random seed of the rows drawn from sources with a weight below 1.
        cache_dir: Folder of the cache, as for `build_dataset`.
        progress: Called after every batch with the number of rows read so far.

    Returns:
        The rows, memory-mapped, and the report on them. A row has the ``prompt_ids`` as int32, the ``question`` (the
        last message before the answer), the ``reference`` (the answer), and the ``place`` that it was read from.

    Raises:
        RowError: At the first row that cannot be used, if ``on_bad_row`` is ``stop``.
        DataError: If a source cannot be read, no row can be used, or the disk is full.
        ConfigError: If ``mapping`` names a field or role that does not exist.
    """
    return build(
        RowSchema(
            columns={"prompt_ids": IDS, "question": pa.string(), "reference": pa.string()},
            report=PromptReport,
            fit=partial(_fit, tokenizer, max_length),
            fingerprinted=_numbers,
            purpose=("answer", "with a prompt that fits"),
        ),
        readings(sources, tokenizer, mapping=mapping, learn=Learn.last, seed=seed),
        sources,
        tokenizer,
        {"max_length": max_length, "mapping": dict(mapping or {}), "seed": seed},
        on_bad_row=on_bad_row,
        cache_dir=cache_dir,
        progress=progress,
    )


def _numbers(row: Mapping[str, Any]) -> list[int]:
    return [len(row["prompt_ids"]), *row["prompt_ids"], *row["reference"].encode()]


def _fit(
    tokenizer: PreTrainedTokenizerBase, max_length: int, batch: Sequence[ExampleReading], report: PromptReport
) -> Iterator[list[dict[str, Any]] | str | DataError]:
    for reading in batch:
        if not isinstance(reading.example, Conversation):
            yield DataError(
                "it is a plain text", expected="a prompt with an answer", fix="hymba-tune sft trains on texts"
            )
            continue
        prompt, reference = before_last_answer(reading.example)
        ids = encode_prompt(prompt, tokenizer)
        if len(ids) > max_length:
            yield f"its prompt has {len(ids):,} tokens, more than the {max_length:,} that --max-new-tokens leaves"
            continue

        report.prompts += 1
        report.tokens += len(ids)
        report.learned += reading.encoded[0].learned
        report.longest = max(report.longest, len(ids))
        report.special += bool(reading.special)
        question = prompt.messages[-1].content if prompt.messages else ""
        yield [{"prompt_ids": ids, "question": _storable(question), "reference": _storable(reference)}]


def _storable(text: str) -> str:
    """Replace lone surrogates, which JSON can hold and Arrow cannot."""
    return text.encode("utf-8", "replace").decode()
