"""The files of an evaluation: its results, its answers, and the list of evaluations in a run directory."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hymba_tune import __version__
from hymba_tune.config import EvalConfig
from hymba_tune.errors import CheckpointError
from hymba_tune.evaluate.evaluation import Evaluation, ModelResult
from hymba_tune.files import atomic_write, locked, read_json, write_errors, write_text

EVALUATIONS = "evaluations.json"


def facts(evaluation: Evaluation) -> dict[str, Any]:
    """The settings and results, without the answers, as a JSON object."""
    config = evaluation.config
    settings = config.model_dump(mode="json", include=config.model_fields_set - {"out", "save_answers"})
    first, *others = evaluation.results
    compared = [
        {"with": other.name, "tests": {name: asdict(test) for name, test in first.tested(other).items()}}
        for other in others
    ]
    return {
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "version": __version__,
        "settings": settings,
        "models": [_model(result) for result in evaluation.results],
        "compared": compared,
    }


def _model(result: ModelResult) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": result.name, "weight_bytes": result.weight_bytes, "seconds": result.seconds}
    if result.texts:
        facts["data"] = asdict(result.texts)
    if result.note:
        facts["note"] = result.note
    return facts | {"measures": result.measures, "tasks": result.tasks}


def save(evaluation: Evaluation) -> None:
    """Write the files that ``--out`` and ``--save-answers`` name.

    Raises:
        ConfigError: If a file cannot be written.
    """
    config = evaluation.config
    contents: dict[tuple[str, Path], str] = {}
    if config.out:
        contents["--out", config.out] = _json(facts(evaluation))
    if config.save_answers:
        contents["--save-answers", config.save_answers] = "".join(_answer_lines(evaluation))
    with ExitStack() as files:  # all are written before the first one gets its name
        for (flag, path), text in contents.items():
            files.enter_context(write_errors(flag, path))
            part = files.enter_context(atomic_write(path, overwrite=config.overwrite))
            part.write_text(text, encoding="utf-8")


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _answer_lines(evaluation: Evaluation) -> list[str]:
    return [
        json.dumps(
            {
                "model": result.name,
                "messages": [{"role": m.role, "content": m.content} for m in one.question.prompt.messages],
                "answer": one.answer,
                "reference": one.question.reference,
                "found": one.extracted,
                "expected": one.expected,
                "right": one.correct,
            },
            ensure_ascii=False,
        )
        + "\n"
        for result in evaluation.results
        for one in result.answered
    ]


def run_of(config: EvalConfig) -> Path | None:
    """The run directory, if the evaluated model is a run."""
    path = Path(config.model).expanduser()
    return path if (path / "run.json").is_file() else None


def check_run(run: Path) -> None:
    """Check that `add_to_run` can read the run's list, before hours are spent on an evaluation.

    Raises:
        CheckpointError: If it cannot.
    """
    path = run / EVALUATIONS
    if path.is_file() and read_json(path, list) is None:
        raise CheckpointError(f"{path} cannot be read.", fix="move the file away; it only lists evaluations")


def add_to_run(evaluation: Evaluation, run: Path) -> None:
    """Append an evaluation to the run's list.

    Raises:
        CheckpointError: If the list cannot be read.
        ConfigError: If it cannot be written.
    """
    path = run / EVALUATIONS
    with write_errors("the list of evaluations", path), locked(run / ".evaluations.lock", wait=True):
        check_run(run)  # another evaluation of the run may have ended meanwhile
        earlier = read_json(path, list) or []
        write_text(path, _json([*earlier, facts(evaluation)]))
