"""Generation: reading prompts, then writing token by token, and the bytes that a cache holds meanwhile.

The 15.75M-parameter Hymba and the packaged hymba-nano beside a Llama of the same width and depth with transformers'
`DynamicCache`, for growing batches and prompts. Each round writes on from where the one before it ended.
"""

from __future__ import annotations

from dataclasses import dataclass

import harness
import models
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from hymba_tune.checkpoint import load_weights
from hymba_tune.model import HymbaCache
from hymba_tune.model.cache import CACHE_NAME
from hymba_tune.registry import resolve_model

BATCHES, PROMPTS = (1, 4, 16), (128, 1024, 4096)
MOST, OFTEN = 16_384, 2048
"""Tokens in all prompts up to which a case is measured at all, and up to which prompts are read in every round."""
WRITTEN = 16
"""Tokens a text that one round writes."""


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    given = harness.options(__doc__, arguments, repeats=3)
    batches, prompts, toy = ((1, 2), (8,), models.TOY) if given.quick else (BATCHES, PROMPTS, {})
    rows: list[dict[str, harness.Cell]] = []
    for dtype in given.dtypes:
        candidates: dict[str, PreTrainedModel] = {
            "hymba": models.hymba(given.device, dtype, **toy).eval(),
            "hymba-nano": load_weights(resolve_model("hymba-nano"), dtype=dtype, device=given.device).eval(),
            "llama": models.llama(given.device, dtype, **toy).eval(),
        }
        cases = [(batch, prompt) for batch in batches for prompt in prompts if batch * prompt <= MOST]
        for batch, prompt in cases:
            rows += compare(candidates, batch, prompt, given.repeats)
    notes = [
        "Random prompts of one length; the likeliest token is written. x llama: tokens written a second, over Llama's.",
        f"Prompts of more than {OFTEN:,} tokens in all are read once. Cache: with all that was written.",
    ]
    harness.report("decode", list(rows[0]), rows, notes, given)


def compare(
    candidates: dict[str, PreTrainedModel], batch: int, prompt: int, repeats: int
) -> list[dict[str, harness.Cell]]:
    """Read and write with every model; a row of the report for each."""
    # The round that warms up writes too. A model is not asked for texts longer than it is made for.
    length = prompt + WRITTEN * (repeats + 1)
    texts = {
        name: Texts(model, models.random_ids(model, batch, prompt))
        for name, model in candidates.items()
        if length <= model.config.max_position_embeddings
    }
    often = batch * prompt <= OFTEN
    reads = harness.interleave({name: text.read for name, text in texts.items()}, repeats if often else 1, int(often))
    writes = harness.interleave({name: text.write for name, text in texts.items()}, repeats)
    return [
        {
            "dtype": harness.short(candidates[name].dtype),
            "model": name,
            "batch": batch,
            "prompt": prompt,
            "prompt ms": reads[name].median * 1e3,
            "read tokens/s": batch * prompt / reads[name].median,
            "written tokens/s": batch * WRITTEN / write.median,
            "x llama": writes["llama"].over(write),
            "cache MB": harness.megabytes(models.cache_bytes(texts[name].cache)),
        }
        for name, write in writes.items()
    ]


@dataclass
class Texts:
    """A batch that a model reads and then goes on writing."""

    model: PreTrainedModel
    prompt: Tensor
    cache: Cache = None
    last: Tensor | None = None

    def read(self) -> None:
        """Forget what was written and read the prompts."""
        self.cache = HymbaCache(self.model.config) if self.model.config.model_type == "hymba" else DynamicCache()
        self._go_on(self.prompt)

    def write(self) -> None:
        """Write a few tokens more."""
        for _ in range(WRITTEN):
            self._go_on(self.last)

    @torch.inference_mode()
    def _go_on(self, ids: Tensor | None) -> None:
        output = self.model(input_ids=ids, **{CACHE_NAME: self.cache}, use_cache=True, logits_to_keep=1)
        self.last = output.logits.argmax(-1)


if __name__ == "__main__":
    main()
