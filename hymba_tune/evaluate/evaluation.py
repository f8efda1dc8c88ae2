"""An evaluation: everything is resolved and checked first, then each model is loaded, measured and freed in turn."""

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
    read_questions,
    score_answers,
)
from hymba_tune.evaluate.scoring import score_rows
from hymba_tune.evaluate.texts import ScoringTexts, TextCounts
from hymba_tune.files import check_file, remove_leftovers
from hymba_tune.files.checkpoints import at_checkpoint
from hymba_tune.generate import LoadableModel, find_model
from hymba_tune.inputs import check_inputs
from hymba_tune.registry import resolve_model
from hymba_tune.significance import Outcome, compare_counts, compare_sums


@dataclass
class ModelResult:
    """The results of one model.

    Attributes:
        name: The model's name, as the user gave it.
        weight_bytes: Size of the weights in memory, in bytes.
        note: A note for the user on how the adapters were merged, if there is one.
        seconds: Duration, including loading.
        measures: Values by name: ``loss``, ``perplexity``, ``bits_per_byte`` and ``token_accuracy`` on texts;
            ``exact_match``, ``exact_match_stderr`` and ``answers_found`` on questions.
        tasks: The metrics of each lm-eval task, by task name and metric name.
        texts: Counts of the texts that were scored.
        row_nats: The summed loss of each row of these texts.
        answered: The questions with the model's answers.
    """

    name: str
    weight_bytes: int = 0
    note: str | None = None
    seconds: float = 0.0
    measures: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    texts: TextCounts | None = None
    row_nats: Sequence[float] = ()
    answered: list[AnsweredQuestion] = field(default_factory=list)

    def tested(self, other: ModelResult) -> dict[str, Outcome]:
        """Test whether this model is better than another one on the same rows and questions, by measure.

        Models with different tokenizers are compared by their bits per byte.
        """
        tests = {}
        if self.texts and other.texts and len(self.row_nats) == len(other.row_nats):
            same_tokens = self.texts.fingerprint == other.texts.fingerprint
            tests["loss" if same_tokens else "bits_per_byte"] = compare_sums(other.row_nats, self.row_nats)
        if self.answered:
            right = [(mine.correct, theirs.correct) for mine, theirs in zip(self.answered, other.answered, strict=True)]
            gained, lost = right.count((True, False)), right.count((False, True))
            tests["exact_match"] = compare_counts(gained, lost, n=len(right))
        return tests


@dataclass
class Evaluation:
    """The results of all models, the evaluated one first."""

    config: EvalConfig
    results: list[ModelResult]


def evaluate(config: EvalConfig, working: Working) -> Evaluation:
    """Evaluate a model, and others to compare it with.

    Args:
        config: The models, the data and the tasks.
        working: Shows progress.

    Raises:
        HymbaTuneError: If something cannot be found or used; everything is checked before any weights load.
    """
    check_inputs(config)
    _check_outputs(config)
    loadables = [find_model(name, config, config.chat_template) for name in _names(config)]
    questions, extract = _questions(config)
    tasks = _Tasks(config) if config.tasks else None
    texts: list[ScoringTexts] = []
    counts: list[TextCounts] = []
    for loadable in loadables if config.data else ():
        texts.append(ScoringTexts.named(config, loadable.tokenizer))
        with working("reading the data") as progress:
            counts.append(texts[-1].count(progress))

    results = []
    for number, loadable in enumerate(loadables):
        started = time.monotonic()
        with working(f"loading {loadable.source.name}"):
            model = loadable.load()
        result = ModelResult(loadable.source.name, model.get_memory_footprint(return_buffers=False), loadable.note)
        if texts:
            _score(result, model, texts[number], counts[number], config, working)
        if questions:
            _answer(result, model, loadable, questions, extract, config, working)
        if tasks:
            result.tasks = tasks.run(model, loadable, working)
        del model  # freed before the next one loads
        result.seconds = time.monotonic() - started
        results.append(result)
    return Evaluation(config, results)


def _check_outputs(config: EvalConfig) -> None:
    remove_leftovers(*(path for path in (config.out, config.save_answers) if path))
    inputs = [*local_files(config.data), *map(Path, config.tasks), Path(config.chat_template or "")]
    for flag, path in (("--out", config.out), ("--save-answers", config.save_answers)):
        if path:
            check_file(flag, path, overwrite=config.overwrite, inputs=[each for each in inputs if each.name])
    if config.out and config.save_answers and config.out.resolve() == config.save_answers.resolve():
        raise ConfigError(f"--out and --save-answers are both {config.out}.", fix="two different file names")


def _names(config: EvalConfig) -> list[str]:
    model = at_checkpoint(config.model, config.checkpoint)
    names = [model, *config.against]
    if config.base:
        source = resolve_model(model)
        if source.adapter is None:
            raise ConfigError(
                f"--base: {source.name} has no adapter, so it has no base model.",
                fix="--against MODEL",
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
    result.texts, result.row_nats = counts, score.row_nats
    result.measures |= {
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "token_accuracy": score.accuracy,
    }


def _answer(
    result: ModelResult,
    model: PreTrainedModel,
    loadable: LoadableModel,
    questions: Sequence[Question],
    extract: Extraction,
    config: EvalConfig,
    working: Working,
) -> None:
    with working(f"answering {len(questions):,} questions with {result.name}") as progress:
        result.answered = answer_questions(
            model,
            loadable.tokenizer,
            questions,
            extract,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            cuda_graphs=config.cuda_graphs,
            progress=progress,
        )
    score = score_answers(result.answered)
    result.measures |= {
        "exact_match": score.exact_match,
        "exact_match_stderr": score.standard_error,
        "answers_found": score.extracted / score.questions,
    }


class _Tasks:
    """lm-eval tasks, resolved before any model loads."""

    def __init__(self, config: EvalConfig) -> None:
        from hymba_tune.evaluate import harness  # slow to import

        self._harness = harness
        self._config = config
        self.names, self._manager = harness.find_tasks(config.tasks)

    def run(self, model: PreTrainedModel, loadable: LoadableModel, working: Working) -> dict[str, dict[str, float]]:
        config: Any = self._config
        with working(f"{', '.join(self.names)} with {loadable.source.name}") as progress:
            lm = self._harness.HymbaLM(
                model,
                loadable.tokenizer,
                batch_size=config.batch_size,
                cuda_graphs=config.cuda_graphs,
                progress=progress,
            )
            return self._harness.run_tasks(
                lm,
                self.names,
                self._manager,
                fewshot=config.fewshot,
                limit=config.max_rows,
                as_chat=config.as_chat,
            )
