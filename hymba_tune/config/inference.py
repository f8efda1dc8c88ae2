"""The settings of verbs that ask a model: `hymba-tune chat`, `eval` and `serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from cyclopts import Group, Parameter
from pydantic import Field

from hymba_tune.config.base import Learn, Names, OnBadRow, Pairs
from hymba_tune.config.groups import ANSWERS, DATA, EVALUATION, SERVER
from hymba_tune.config.options import EngineOptions, ModelOptions, OutputOptions, ReadingOptions


class GenerationOptions(EngineOptions, ModelOptions):
    """Which model is asked, and how it computes."""


class ChatConfig(OutputOptions, GenerationOptions):
    """Talking to a model."""

    group: ClassVar[Group] = ANSWERS

    against: Names = Field(default_factory=list)
    """Further models that are asked the same, to compare their answers."""
    prompt: str | None = None
    """Answer this and end."""
    prompts: Annotated[Path | None, Parameter(name="--from")] = None
    """Answer every row of this file, which has a prompt or messages, into --to."""
    to: Path | None = None
    """The rows of --from with their answers: .jsonl. A command that was stopped goes on where it was."""
    map: Pairs = Field(default_factory=list)
    """Names of columns of --from that differ: --map prompt=question."""
    batch_size: int = Field(default=8, ge=1)
    """Rows of --from that are answered at a time."""
    system: str | None = None
    """System prompt."""
    max_new_tokens: int = Field(default=512, ge=1)
    """Tokens an answer may have."""
    temperature: float = Field(default=0.7, ge=0)
    """0 takes the likeliest token each time."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Sample from the likeliest tokens that together have this probability."""
    seed: int | None = Field(default=None, ge=0)
    """Seed of the sampling."""


class ScoringOptions(ReadingOptions):
    """Which texts a model is scored on."""

    group: ClassVar[Group] = DATA

    data: Names = Field(default_factory=list)
    """What sft takes as --data."""
    on_bad_row: OnBadRow = OnBadRow.stop
    """stop at a row that cannot be used, or leave it out."""
    learn: Annotated[Learn, Parameter(name="--score")] = Learn.all
    """Score all answers of a conversation, or only the last."""


class EvalConfig(ScoringOptions, OutputOptions, GenerationOptions):
    """How good a model is."""

    group: ClassVar[Group] = EVALUATION

    model: Annotated[str, Parameter(parse=False)] = ""
    """The model."""
    against: Names = Field(default_factory=list)
    """Further models, evaluated in the same way and set beside it."""
    base: bool = Field(default=False)
    """Set the model that the adapter was trained on beside it."""
    data: Names = Field(default_factory=list)
    """What sft takes as --data: the loss on it, perplexity and bits per byte."""
    max_rows: int | None = Field(default=None, ge=1)
    """Rows after which each source of --data ends; of a task, examples."""
    batch_size: int = Field(default=8, ge=1)
    """Texts that are computed at a time."""
    answers: Literal["gsm8k", "number", "exact"] | None = None
    """Let the model answer the prompts of --data and compare with the known answers: by what follows #### (gsm8k), by
    the last number, or by the whole answer."""
    extract: str | None = None
    """The same by a regular expression: its last match, or that match's first group, is what is compared."""
    max_new_tokens: int = Field(default=512, ge=1)
    """Tokens an answer may have."""
    save_answers: Path | None = None
    """Write what was answered to this file: .jsonl, a row a question."""
    tasks: Names = Field(default_factory=list)
    """Tasks of lm-eval by name, or folders of them: --tasks arc_easy my-tasks/ (needs the extra eval)."""
    fewshot: int | None = Field(default=None, ge=0)
    """Solved examples in front of each question of a task. When not given: as the task says."""
    as_chat: bool = False
    """Put the questions of tasks into the model's chat template."""
    out: Path | None = None
    """Write the results to this file as JSON."""


class ServeConfig(GenerationOptions):
    """A model behind OpenAI's interface."""

    group: ClassVar[Group] = SERVER

    model: Annotated[str, Parameter(parse=False)] = ""
    """The model."""
    host: str = "127.0.0.1"
    """Address to listen on. Only this machine reaches the usual one; others let in everybody who reaches them."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    chat_template: str | None = None
    """hymba, alpaca, or a file of Jinja. When not given: the model's own, or hymba."""
    batch_size: int = Field(default=8, ge=1)
    """Texts that are written at a time; further ones wait, and join as others end."""
    queue: int = Field(default=64, ge=1)
    """Texts that may wait; requests beyond are refused (status 429)."""
    max_new_tokens: int = Field(default=1024, ge=1)
    """Tokens that a request may ask for, and that a chat gets which asks for no number."""
    max_body: int = Field(default=1024, ge=1)
    """Kilobytes that a request may have."""
