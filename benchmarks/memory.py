"""Peak memory of a training step, by setting, as the batch grows.

The 15.75M-parameter Hymba with the released model's vocabulary of 32,001, whose logits are what skipping them saves.
Every setting is measured in a process of its own, the batches from small to large.
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
"""By name: whether layers are computed again in the backward, and whether ``skip_logits`` is on."""


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    given = harness.options(__doc__, arguments, repeats=1)
    texts, length, changes = ([1, 2], 16, models.TOY) if given.quick else ([1, 2, 6], LENGTH, {})
    changes = changes | {"vocab_size": VOCABULARY}
    rows: list[dict[str, harness.Cell]] = []
    for dtype in given.dtypes:
        for name, setting in SETTINGS.items():
            peaks = harness.in_child(peaks_of, *setting, texts, length, dtype, given.device, changes)
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
        f"Texts of {length} tokens; peak beyond the weights, with gradients, no optimizer; outputs live to the end.",
        f"Gradients alone are {gradients_mb(changes):,.0f} MB in float32.",
    ]
    harness.report("memory", list(rows[0]), rows, notes, given)


def gradients_mb(changes: dict[str, Any]) -> float:
    """Megabytes of one float32 for each weight."""
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
    """Peak memory of a step on batches of so many texts."""
    model = models.hymba(device, dtype, **changes)
    if checkpointing:
        model.activation_checkpointing_enable()
    peaks: list[int | None] = []
    for count in (1, *texts):
        # The first is a short text, so that what is loaded or compiled on first use is not counted.
        ids = models.random_ids(model, count, length if peaks else 8)
        model.zero_grad(set_to_none=True)
        peaks.append(harness.peak_memory(partial(step, model, ids, skip_logits), device))
    return peaks[1:]


def step(model: HymbaForCausalLM, ids: Tensor, skip_logits: bool) -> None:
    """A training step as most loops write it: what the model returns lives until the backward is done."""
    output = model(input_ids=ids, labels=ids, use_cache=False, skip_logits=skip_logits)
    output.loss.backward()


if __name__ == "__main__":
    main()
