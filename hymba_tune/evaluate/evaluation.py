"""One evaluation: everything is found and checked, then each model is loaded, asked, and let go again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hymba_tune.adapters import base_of
from hymba_tune.config import EvalConfig, as_mapping
from hymba_tune.data import open_sources
from hymba_tune.data.mixes import local_files
from hymba_tune.data.training import Working
from hymba_tune.errors import ConfigError
from hymba_tune.evaluate.questions import (
    AnsweredQuestion,
    Extraction,
    Question,
    answer_questions,
    judge_answers,
    read_questions,
)
from hymba_tune.evaluate.scoring import score_rows
from hymba_tune.evaluate.texts import ScoringTexts, TextCounts
from hymba_tune.files import check_file
from hymba_tune.generate import LoadableModel, find_model
from hymba_tune.inputs import check_inputs
from hymba_tune.registry import resolve_model


@dataclass
class ModelResult:
    """What one model came to.

    Attributes:
        name: What its user calls it.
        weight_bytes: Of its weights in memory.
        note: What is worth knowing of how its adapters were folded in.
        seconds: It took, loading included.
        measures: Numbers by name: ``loss``, ``perplexity``, ``bits_per_byte``, ``token_accuracy`` on texts;
            ``exact_match``, ``exact_match_stderr`` and ``answers_found`` on questions.
        tasks: Numbers by name, by the name of a task.
        texts: What it was scored on.
        answered: What it was asked.
    """

    name: str
    weight_bytes: int = 0
    note: str | None = None
    seconds: float = 0.0
    measures: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    texts: TextCounts | None = None
    answered: list[AnsweredQuestion] = field(default_factory=list)


@dataclass
class Evaluation:
    """Models side by side, the one in question first."""

    config: EvalConfig
    results: list[ModelResult]


def evaluate(config: EvalConfig, working: Working) -> Evaluation:
    """Evaluate a model, and others to compare it with.

    Args:
        config: Which, and on what.
        working: Told what is done.

    Raises:
        HymbaTuneError: If something cannot be found or used; all of it is looked at before any weights load.
    """
    check_inputs(config)
    _check_outputs(config)
    models = [find_model(name, config, config.chat_template) for name in _names(config)]
    questions, extract = _questions(config)
    tasks = _Tasks(config) if config.tasks else None
    texts: list[ScoringTexts] = []
    counts: list[TextCounts] = []
    for model in models if config.data else ():
        texts.append(ScoringTexts.named(config, model.tokenizer))
        with working("reading the data") as progress:
            counts.append(texts[-1].count(progress))
    results = []
    for number, found in enumerate(models):
        started = time.monotonic()
        with working(f"loading {found.source.name}"):
            model = found.load()
        result = ModelResult(found.source.name, model.get_memory_footprint(return_buffers=False), found.note)
        if texts:
            _score(result, model, texts[number], counts[number], config, working)
        if questions:
            _ask(result, model, found, questions, extract, config, working)
        if tasks:
            result.tasks = tasks.run(model, found, working)
        del model  # before the next one loads
        result.seconds = time.monotonic() - started
        results.append(result)
    return Evaluation(config, results)


def _check_outputs(config: EvalConfig) -> None:
    inputs = [*local_files(config.data), *map(Path, config.tasks), Path(config.chat_template or "")]
    for flag, path in (("--out", config.out), ("--save-answers", config.save_answers)):
        if path:
            check_file(flag, path, overwrite=config.overwrite, inputs=[each for each in inputs if each.name])
    if config.out and config.save_answers and config.out.resolve() == config.save_answers.resolve():
        raise ConfigError(f"--out and --save-answers are both {config.out}.", fix="two names")


def _names(config: EvalConfig) -> list[str]:
    names = [config.model, *config.against]
    if config.base:
        source = resolve_model(config.model)
        if source.adapter is None:
            raise ConfigError(
                f"--base: {source.name} has no adapter, so that it has no base model.", fix="--against MODEL"
            )
        base_of(source)
        names.append(source.base or "")
    return list(dict.fromkeys(names))


def _questions(config: EvalConfig) -> tuple[list[Question], Extraction]:
    extract = Extraction(config.answers, config.extract)
    if not (config.answers or config.extract):
        return [], extract
    sources = open_sources(config.data)
    return read_questions(sources, extract, max_rows=config.max_rows, mapping=as_mapping(config.map)), extract


def _score(
    result: ModelResult,
    model: PreTrainedModel,
    texts: ScoringTexts,
    counts: TextCounts,
    config: EvalConfig,
    working: Working,
) -> None:
    with working(f"scoring {counts.parts:,} rows with {result.name}") as progress:
        score = score_rows(model, texts.rows(), batch_size=config.batch_size, progress=progress)
    result.texts = counts
    result.measures |= {
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "token_accuracy": score.accuracy,
    }


def _ask(
    result: ModelResult,
    model: PreTrainedModel,
    found: LoadableModel,
    questions: Sequence[Question],
    extract: Extraction,
    config: EvalConfig,
    working: Working,
) -> None:
    with working(f"asking {result.name} {len(questions):,} questions") as progress:
        result.answered = answer_questions(
            model,
            found.tokenizer,
            questions,
            extract,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            progress=progress,
        )
    score = judge_answers(result.answered)
    result.measures |= {
        "exact_match": score.exact_match,
        "exact_match_stderr": score.standard_error,
        "answers_found": score.found / score.questions,
    }


class _Tasks:
    """Tasks of lm-eval, found but not yet run."""

    def __init__(self, config: EvalConfig) -> None:
        from hymba_tune.evaluate import harness  # slow to import

        self._harness, self._config = harness, config
        self.names, self._manager = harness.find_tasks(config.tasks)

    def run(self, model: PreTrainedModel, found: LoadableModel, working: Working) -> dict[str, dict[str, float]]:
        config: Any = self._config
        with working(f"{', '.join(self.names)} with {found.source.name}") as progress:
            lm = self._harness.HymbaLM(model, found.tokenizer, batch_size=config.batch_size, progress=progress)
            return self._harness.run_tasks(
                lm,
                self.names,
                self._manager,
                fewshot=config.fewshot,
                limit=config.max_rows,
                as_chat=config.as_chat,
            )
