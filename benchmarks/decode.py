"""Generation: prefill, decoding token by token, and the size of the cache.

Compares the 15.75M-parameter Hymba and the packaged hymba-nano with a Llama of the same width and depth, for growing
batches and prompts. Each round of decoding continues from the last one. Llama's cache has room for all tokens, since
transformers' `DynamicCache` copies its whole content for every token.
"""

from __future__ import annotations

from dataclasses import dataclass

import harness
import models
import torch
from gpu_decode import RoomyLayer
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from hymba_tune.checkpoint import load_weights
from hymba_tune.model import HymbaCache
from hymba_tune.model.cache import CACHE_NAME
from hymba_tune.registry import resolve_model

BATCHES, PROMPTS = (1, 4, 16), (128, 1024, 4096)
MAX_PROMPT_TOKENS = 16_384
"""Maximum number of tokens of all prompts together; larger cases are skipped."""
REPEATED_PREFILL = 2048
"""Number of prompt tokens up to which prefill is repeated in every round."""
NEW_TOKENS = 16
"""Number of tokens that one round generates for each text."""


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    options = harness.options(__doc__, arguments, repeats=3)
    batches, prompts, toy = ((1, 2), (8,), models.TOY) if options.quick else (BATCHES, PROMPTS, {})
    rows: list[dict[str, harness.Cell]] = []
    for dtype in options.dtypes:
        candidates: dict[str, PreTrainedModel] = {
            "hymba": models.hymba(options.device, dtype, **toy).eval(),
            "hymba-nano": load_weights(resolve_model("hymba-nano"), dtype=dtype, device=options.device).eval(),
            "llama": models.llama(options.device, dtype, **toy).eval(),
        }
        cases = [(batch, prompt) for batch in batches for prompt in prompts if batch * prompt <= MAX_PROMPT_TOKENS]
        for batch, prompt in cases:
            rows += compare(candidates, batch, prompt, options.repeats)
    notes = [
        "Random prompts of one length, greedy decoding. x llama: generated tokens per second relative to Llama.",
        f"Prefill of more than {REPEATED_PREFILL:,} tokens is timed once. The cache includes all generated tokens.",
    ]
    harness.report("decode", list(rows[0]), rows, notes, options)


def compare(
    candidates: dict[str, PreTrainedModel], batch: int, prompt: int, repeats: int
) -> list[dict[str, harness.Cell]]:
    """Time prefill and decoding of every model; returns a row of the report for each."""
    # The warm-up round generates too. Models whose context is too short for all rounds are skipped.
    length = prompt + NEW_TOKENS * (repeats + 1)
    texts = {
        name: TextBatch(model, models.random_ids(model, batch, prompt))
        for name, model in candidates.items()
        if length <= model.config.max_position_embeddings
    }
    repeated = batch * prompt <= REPEATED_PREFILL
    prefills = {name: text.prefill for name, text in texts.items()}
    prefill_times = harness.interleave(prefills, repeats if repeated else 1, int(repeated))
    texts["llama"].make_room(2 * NEW_TOKENS * (repeats + 1))  # a short call is made twice
    decode_times = harness.interleave({name: text.decode for name, text in texts.items()}, repeats)
    return [
        {
            "dtype": harness.short(candidates[name].dtype),
            "model": name,
            "batch": batch,
            "prompt": prompt,
            "prompt ms": prefill_times[name].median * 1e3,
            "read tokens/s": batch * prompt / prefill_times[name].median,
            "written tokens/s": batch * NEW_TOKENS / timing.median,
            "x llama": decode_times["llama"].over(timing),
            "cache MB": harness.megabytes(models.cache_bytes(texts[name].cache)),
        }
        for name, timing in decode_times.items()
    ]


@dataclass
class TextBatch:
    """A batch of prompts and the model that continues them."""

    model: PreTrainedModel
    prompt: Tensor
    cache: Cache = None
    last: Tensor | None = None

    def prefill(self) -> None:
        """Start over with an empty cache and prefill the prompts."""
        self.cache = HymbaCache(self.model.config) if self.model.config.model_type == "hymba" else DynamicCache()
        self._forward(self.prompt)

    def make_room(self, tokens: int) -> None:
        """Move the keys and values of a `DynamicCache` to memory with room for more tokens."""
        batch = len(self.prompt)
        self.cache.layers[:] = [RoomyLayer(layer, batch, tokens) for layer in self.cache.layers]

    def decode(self) -> None:
        """Generate `NEW_TOKENS` more tokens."""
        for _ in range(NEW_TOKENS):
            self._forward(self.last)

    @torch.inference_mode()
    def _forward(self, ids: Tensor | None) -> None:
        output = self.model(input_ids=ids, **{CACHE_NAME: self.cache}, use_cache=True, logits_to_keep=1)
        self.last = output.logits.argmax(-1)


if __name__ == "__main__":
    main()
