"""Peak memory of a training step, by setting, as the batch grows.

The model is the 15.75M-parameter Hymba with the released model's vocabulary of 32,001, whose logits are large enough
that skipping them shows. Every setting is measured in a separate process, from small batches to large ones.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import harness
import models
import torch
from torch import Tensor

from hymba_tune.model import HymbaForCausalLM

LENGTH = 512
VOCABULARY = 32_001
SETTINGS = {
    "plain": (False, False),
    "no logits": (False, True),
    "checkpointing": (True, False),
    "checkpointing, no logits": (True, True),
}
"""By name: whether activation checkpointing is on, and whether ``skip_logits`` is on."""


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    options = harness.options(__doc__, arguments, repeats=1)
    texts, length, changes = ([1, 2], 16, models.TOY) if options.quick else ([1, 2, 6], LENGTH, {})
    changes = changes | {"vocab_size": VOCABULARY}
    rows: list[dict[str, harness.Cell]] = []
    for dtype in options.dtypes:
        for name, setting in SETTINGS.items():
            peaks = harness.in_child(peaks_of, *setting, texts, length, dtype, options.device, changes)
            rows += [
                {
                    "dtype": harness.short(dtype),
                    "setting": name,
                    "tokens": count * length,
                    "peak MB": harness.megabytes(peak),
                    "kB a token": None if peak is None else peak / (count * length) / 1e3,
                }
                for count, peak in zip(texts, peaks, strict=True)
            ]
    notes = [
        f"Texts of {length} tokens; peak without weights and optimizer, with gradients; outputs are kept to the end.",
        f"Gradients alone are {gradients_mb(changes):,.0f} MB in float32.",
    ]
    harness.report("memory", list(rows[0]), rows, notes, options)


def gradients_mb(changes: dict[str, Any]) -> float:
    """Size of one float32 value per weight, in megabytes."""
    return 4 * models.millions(models.hymba(torch.device("meta"), torch.float32, **changes))


def peaks_of(
    checkpointing: bool,
    skip_logits: bool,
    texts: list[int],
    length: int,
    dtype: torch.dtype,
    device: torch.device,
    changes: dict[str, Any],
) -> list[int | None]:
    """Peak memory of a step, for each batch size in texts."""
    model = models.hymba(device, dtype, **changes)
    if checkpointing:
        model.activation_checkpointing_enable()
    peaks: list[int | None] = []
    for count in (1, *texts):
        # The first is a short text, so that memory for loading and compiling is not counted.
        ids = models.random_ids(model, count, length if peaks else 8)
        model.zero_grad(set_to_none=True)
        peaks.append(harness.peak_memory(partial(step, model, ids, skip_logits), device))
    return peaks[1:]


def step(model: HymbaForCausalLM, ids: Tensor, skip_logits: bool) -> None:
    """A training step as in most loops: the model's output is kept until the backward is finished."""
    output = model(input_ids=ids, labels=ids, use_cache=False, skip_logits=skip_logits)
    output.loss.backward()


if __name__ == "__main__":
    main()
