"""Decoding at the released size behind 8,192 tokens, beside Llama-3.2-3B, and what the memory's bandwidth allows.

Both models have random weights in bfloat16 and the released shapes, and caches of random numbers, so that no prompt has
to be computed. Llama's cache does not copy its keys. At 8 texts, models and caches need 19 GB of memory.

The bandwidth is that of reading one large tensor, measured in every round of the same run. A token reads all weights,
the keys and values that it attends to, and the states, which it also writes; the least time is these bytes over the
bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import gpu_models
import harness
import models
import torch
from gpu_decode import STEPS, Generation, RoomyLayer, bytes_per_text
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from hymba_tune.model import HymbaCache
from hymba_tune.model.few_rows import multiply

BATCHES, CONTEXT = (1, 4, 8), 8192
READ = 2**30
"""The bytes that are read to measure the bandwidth; no cache of a processor holds as many."""


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    switches = {"own": "measure Hymba alone, in 6 GB of memory"}
    options = harness.options(__doc__, arguments, repeats=3, switches=switches)
    context, batches = (40, (1, 2)) if options.quick else (CONTEXT, BATCHES)
    memory = torch.ones(READ // 1024 if options.quick else READ // 4, device=options.device)
    makers = {"hymba": gpu_models.hymba} | ({} if options.switches else {"llama": gpu_models.llama})
    compared = {name: make(options.device, quick=options.quick).eval() for name, make in makers.items()}
    rows: list[dict[str, harness.Cell]] = []
    with torch.inference_mode():
        for batch in batches:
            rows += compare(compared, batch, context, options.repeats, memory)
    notes = [
        f"{context:,} tokens of each text in the cache; {STEPS} tokens a call, greedy, head included.",
        "MB a token: what a step reads and writes, over its tokens. GB/s: the bandwidth. % limit: the least time",
        "of these bytes over the time needed. x linear: the time over that of the model's linear layers alone, as",
        "PyTorch computes them; x own linear: as this package does.",
    ]
    harness.report("headline" if "llama" in compared else "headline_own", list(rows[0]), rows, notes, options)


def compare(
    compared: dict[str, PreTrainedModel], batch: int, context: int, repeats: int, memory: Tensor
) -> list[dict[str, harness.Cell]]:
    """Time a batch of the models, their linear layers and the memory; returns a row of the report for each model."""
    room = 2 * STEPS * (repeats + 1)  # a short call is made twice
    ways: dict[str, Callable[[], object]] = {"memory": memory.amax}
    step_bytes = {}
    for name, model in compared.items():
        cache = hymba_cache(model, batch, context) if name == "hymba" else llama_cache(model, batch, context, room)
        ways[name] = Generation(model, cache, batch)
        inputs = linear_inputs(model, batch)
        ways[f"{name} linear"] = partial(linear_layers, inputs, linear)
        ways[f"{name} own linear"] = partial(linear_layers, inputs, multiply)
        keys, states = bytes_per_text(cache, batch)
        step_bytes[name] = weight_bytes(model) + batch * (keys + 2 * states)

    timings = harness.interleave(ways, repeats)
    bandwidth = [memory.nbytes / seconds for seconds in timings["memory"].rounds]
    rows: list[dict[str, harness.Cell]] = []
    for name in compared:
        step = harness.Timing(tuple(seconds / STEPS for seconds in timings[name].rounds))
        limit = harness.Timing(tuple(step_bytes[name] / each for each in bandwidth))
        rows.append(
            {
                "model": name,
                "batch": batch,
                **step.cells(),
                "tokens/s": batch / step.median,
                **({"x llama": timings["llama"].over(timings[name])} if "llama" in timings else {}),
                "x linear": step.over(timings[f"{name} linear"]),
                "x own linear": step.over(timings[f"{name} own linear"]),
                "MB a token": harness.megabytes(round(step_bytes[name] / batch)),
                "GB/s": memory.nbytes / timings["memory"].median / 1e9,
                "% limit": 100 * limit.over(step),
            }
        )
    return rows


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of the weights, those of tied embeddings once, because the head reads all of them."""
    return sum(parameter.nbytes for parameter in model.parameters())


def linear_inputs(model: PreTrainedModel, batch: int) -> list[tuple[Tensor, Tensor]]:
    """Return an input and the weight of every linear layer."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    return [(torch.randn(batch, layer.in_features).to(layer.weight), layer.weight) for layer in layers]


def linear_layers(inputs: list[tuple[Tensor, Tensor]], product: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Compute the linear layers of one token of each text."""
    for x, weight in inputs:
        product(x, weight)


def hymba_cache(model: PreTrainedModel, batch: int, context: int) -> HymbaCache:
    """Return a cache of random keys and values of texts of this length."""
    cache = HymbaCache(model.config)
    model(models.random_ids(model, batch, 2), cache=cache, logits_to_keep=1)
    for buffers in (cache.keys, cache.values):
        for layer, buffer in buffers.items():
            columns = min(cache._limits.get(layer, context), context)
            buffers[layer] = torch.randn_like(buffer[:, :, :1].expand(-1, -1, columns, -1))
    assert cache.lengths is not None
    cache.lengths.fill_(context)
    cache._columns = cache._longest = context
    return cache


def llama_cache(model: PreTrainedModel, batch: int, context: int, room: int) -> Cache:
    """Return a cache of random keys and values of texts of this length, with room for new tokens."""
    config = model.config
    shape = 1, config.num_key_value_heads, context, config.head_dim
    cache = DynamicCache(config=config)
    for place in range(config.num_hidden_layers):
        layer = DynamicLayer()
        layer.keys, layer.values = (torch.randn(shape, device=model.device).to(model.dtype) for _ in range(2))
        cache.layers[place : place + 1] = [RoomyLayer(layer, batch, room)]
    return cache


if __name__ == "__main__":
    main()
