"""The report of a run, written however the run ends."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from hymba_tune.adapters import adapter_updates, full_updates
from hymba_tune.distributed.environment import is_main
from hymba_tune.distributed.sharding import copy_weights, is_divided
from hymba_tune.files import write_text
from hymba_tune.train.base import RunTrainer
from hymba_tune.train.screen import Screen
from hymba_tune.train.setup import Setup, lay_out

logger = logging.getLogger(__name__)


@contextmanager
def reported(setup: Setup, trainer: RunTrainer, screen: Screen) -> Iterator[None]:
    """Write ``report.html`` when the block ends: normally, by Ctrl-C, or by an error.

    An error in the report is shown, not raised: it must not cost the run.

    Args:
        setup: The run's setup.
        trainer: The run's trainer.
        screen: Shows a note if the report cannot be written.
    """
    how = "failed"
    what = ""
    try:
        yield
        how = "finished"
    except KeyboardInterrupt:
        how = "interrupted"
        raise
    except BaseException as error:
        what = str(error) or type(error).__name__
        raise
    finally:
        run = setup.run
        # Of a failed run some processes may be gone, and their parts of divided weights with them.
        model = trainer.model if how == "failed" else whole_model(setup, trainer)
        if is_main() and (how == "finished" or run.newest_checkpoint() is not None):
            _try("run.json", screen, lambda: run.record(ended={"how": how, "what": what}))
            _try("updates.json", screen, lambda: _write_updates(setup, model))
            _try("report.html", screen, lambda: _write_report(run.path))


def whole_model(setup: Setup, trainer: RunTrainer) -> PreTrainedModel:
    """Return the trained model with all its weights: the best ones, if the run ends with those.

    If its weights are divided among the processes, all of them must call this, and only the first one gets weights.

    Args:
        setup: The run's setup.
        trainer: The run's trainer, at its end.
    """
    model: PreTrainedModel = trainer.accelerator.unwrap_model(trainer.model)
    if not trainer.is_divided:
        return model
    whole = lay_out(setup.config, setup.model_config, setup.weights_dtype, setup.added_tokens)
    copy_weights(model, whole)
    if is_main():
        getattr(whole, "get_base_model", lambda: whole)().tie_weights()
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
            trainer.load_weights(Path(trainer.state.best_model_checkpoint), whole)
        whole.to(setup.device)
    return whole


def _try(name: str, screen: Screen, write: Callable[[], Any]) -> None:
    try:
        write()
    except Exception as error:
        logger.exception("%s could not be written", name)
        screen.note(f"{name} could not be written: {error}")


def _write_report(path: Path) -> None:
    from hymba_tune.report import write_report  # imported here because it takes a second

    write_report(path)


def _write_updates(setup: Setup, model: PreTrainedModel | PeftModel) -> None:
    """Write how far each part of the model moved, or why that is unknown."""
    if is_divided(model):
        updates: dict[str, Any] = {"absent": "not measured: the run failed, and its weights are divided"}
    elif isinstance(model, PeftModel):
        updates = {"parts": [asdict(update) for update in adapter_updates(model)]}
    elif setup.source.adapter is None:
        updates = {"parts": [asdict(update) for update in full_updates(model, setup.source.folder)]}
    else:
        updates = {"absent": "not measured: the initial weights, with the first adapter merged, are not saved"}
    write_text(setup.run.path / "updates.json", json.dumps(updates, allow_nan=False) + "\n")
