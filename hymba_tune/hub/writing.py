"""A model written, read again, and compared: what an export and a quantised model have in common."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hymba_tune.checkpoint import load_tokenizer, load_weights
from hymba_tune.data.training import Working
from hymba_tune.hub.checks import check_logits, check_tokens, sample_logits
from hymba_tune.hub.layout import Format, write_model
from hymba_tune.registry import ModelSource


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        model: As it was read again.
        difference: The largest between its logits and those of the model that was written.
    """

    model: PreTrainedModel
    difference: float


def write_checked(
    make: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    layout: Format,
    base: str | None,
    working: Working,
) -> Written:
    """Write a model, and read it again. The two are never in memory together.

    Args:
        make: Opens the model, without an adapter, and keeps nothing of it.
        tokenizer: With a chat template.
        folder: As for `write_model`.
        layout: As there.
        base: As there.
        working: Shows the steps that take long.

    Raises:
        CheckpointError: If it is not the same.
    """
    model = make()
    dtype, device = model.dtype, model.device
    with working("writing"):
        meant = sample_logits(model, tokenizer)
        write_model(model, tokenizer, folder, layout, base)
    del model
    gc.collect()
    with working("reading it again"):
        again = load_weights(ModelSource(folder.name, folder), dtype=dtype, device=device)
        check_tokens(load_tokenizer(folder), tokenizer, folder)
        return Written(again, check_logits(sample_logits(again, tokenizer), meant, folder))


def usual_folder(source: ModelSource, *, ending: str = "") -> Path:
    """Where a model is written to when nothing says so: ``exports/`` and its name, without its owner."""
    return Path("exports") / (Path(source.name).name.replace("@", "-") + ending)
