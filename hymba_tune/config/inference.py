"""The settings of the verbs that run a model: `hymba-tune chat`, `eval` and `serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from cyclopts import Group, Parameter
from pydantic import Field

from hymba_tune.config.base import Comparison, Learn, Names, OnBadRow, Origins, Pairs
from hymba_tune.config.groups import ANSWERS, DATA, EVALUATION, FIRST, SERVER
from hymba_tune.config.options import (
    CheckpointChoice,
    DecodingOptions,
    EngineOptions,
    ModelOptions,
    OutputOptions,
    ReadingOptions,
)


class GenerationOptions(DecodingOptions, EngineOptions, ModelOptions, CheckpointChoice):
    """Settings of the model that generates or scores."""


class ChatConfig(OutputOptions, GenerationOptions):
    """Settings of `hymba-tune chat`."""

    group: ClassVar[Group] = ANSWERS

    against: Names = Field(default_factory=list)
    """Further models that answer the same prompts, for comparison."""
    prompt: str | None = None
    """Answer this prompt and exit."""
    prompts: Annotated[Path | None, Parameter(name="--from")] = None
    """Answer every row of this file (a prompt or messages) and write the answers to --to."""
    to: Path | None = None
    """File for the rows of --from with their answers (.jsonl). An interrupted command resumes where it stopped."""
    map: Pairs = Field(default_factory=list)
    """Column names of --from that differ: --map prompt=question."""
    batch_size: int = Field(default=8, ge=1)
    """Rows of --from to answer at a time."""
    system: str | None = None
    """System prompt."""
    max_new_tokens: int = Field(default=512, ge=1)
    """Maximum tokens of an answer."""
    temperature: float = Field(default=0.7, ge=0)
    """Sampling temperature; 0 is greedy decoding."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Nucleus sampling: sample from the most likely tokens that together have this probability."""
    seed: int | None = Field(default=None, ge=0)
    """Random seed of the sampling."""


class ScoringOptions(ReadingOptions):
    """Settings of the texts that a model is scored on."""

    group: ClassVar[Group] = DATA

    data: Annotated[Names, FIRST] = Field(default_factory=list)
    """Data, as for sft --data."""
    on_bad_row: OnBadRow = OnBadRow.stop
    """What to do with a row that cannot be used: stop, or skip it."""
    learn: Annotated[Learn, Parameter(name="--score")] = Learn.all
    """Score all answers of a conversation, or only the last."""


class EvalConfig(ScoringOptions, OutputOptions, GenerationOptions):
    """Settings of `hymba-tune eval`."""

    group: ClassVar[Group] = EVALUATION

    model: Annotated[str, Parameter(parse=False)] = ""
    """The model."""
    against: Annotated[Names, FIRST] = Field(default_factory=list)
    """Further models to evaluate in the same way, for comparison."""
    base: Annotated[bool, FIRST] = Field(default=False)
    """Also evaluate the model that the adapter was trained on, for comparison."""
    data: Annotated[Names, FIRST] = Field(default_factory=list)
    """Data for loss, perplexity and bits per byte, as for sft --data."""
    max_rows: Annotated[int | None, FIRST] = Field(default=None, ge=1)
    """Maximum rows of each source of --data, and examples of each task."""
    batch_size: Annotated[int, FIRST] = Field(default=8, ge=1)
    """Texts to compute at a time."""
    answers: Annotated[Comparison | None, FIRST] = None
    """Let the model answer the prompts of --data and compare with the reference answers: by the number after ####
    (gsm8k), the last number (number) or the whole answer (exact)."""
    extract: Annotated[str | None, FIRST] = None
    """As --answers, by a regular expression: compares its last match, or the first group of that match."""
    max_new_tokens: Annotated[int, FIRST] = Field(default=512, ge=1)
    """Maximum tokens of an answer."""
    save_answers: Annotated[Path | None, FIRST] = None
    """Write the answers to this file (.jsonl, one row per question)."""
    tasks: Annotated[Names, FIRST] = Field(default_factory=list)
    """Names of lm-eval tasks, or folders of tasks (their Python code is run): --tasks arc_easy my-tasks/ (needs the
    extra eval)."""
    fewshot: Annotated[int | None, FIRST] = Field(default=None, ge=0)
    """Solved examples before each question of a task. Default: the task's own number."""
    as_chat: bool = False
    """Apply the model's chat template to the questions of tasks."""
    out: Annotated[Path | None, FIRST] = None
    """Write the results to this file as JSON."""


class ServeConfig(GenerationOptions):
    """Settings of `hymba-tune serve`."""

    group: ClassVar[Group] = SERVER

    model: Annotated[str, Parameter(parse=False)] = ""
    """The model."""
    host: str = "127.0.0.1"
    """Bind address; the default accepts local connections only."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port; 0 takes a free one."""
    chat_template: str | None = None
    """Chat template: hymba, alpaca, or a Jinja file. Default: the model's own, or hymba."""
    batch_size: int = Field(default=8, ge=1)
    """Texts to generate at a time; others wait, and join when one ends."""
    queue: int = Field(default=64, ge=1)
    """Maximum number of waiting texts; further requests are refused (status 429)."""
    max_new_tokens: int = Field(default=1024, ge=1)
    """Maximum, and the chat default, for max_tokens."""
    max_body: int = Field(default=1024, ge=1)
    """Maximum size of a request in kilobytes."""
    cache_memory: float | None = Field(default=None, gt=0)
    """Memory for the keys and states of running texts, in GB; texts that would exceed it wait. Default: half of what
    is free once the model is loaded."""
    prefix_memory: float | None = Field(default=None, ge=0)
    """Memory for the beginnings of prompts, in GB: system prompts and earlier turns are computed once. 0 keeps none.
    Default: a tenth of what is free once the model is loaded."""
    prefill_chunk: int = Field(default=128, ge=1)
    """Prompt tokens to compute at a time, before the texts that are being generated get their next token."""
    api_key: str | None = None
    """Name of the environment variable with the key that requests must have. The key itself is never printed."""
    cors: Origins = Field(default_factory=list)
    """Web pages that may use the server from a browser: --cors https://chat.example.com, or * for all."""
