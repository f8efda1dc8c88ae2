"""A training step of Hymba, compared with Falcon-H1, Llama, and Hymba's linear layers alone.

A step is forward, loss on every token and backward to all weights of a 15.75M-parameter model, on 4 x 512 tokens. The
second table compares computing the meta tokens once per batch and once per row, as in the classic layout.
"""

from __future__ import annotations

from functools import partial

import harness
import models
from models import Step
from torch import Tensor, nn

from hymba_tune.memory import keep_freed_memory
from hymba_tune.model.backends import use_kernels


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    options = harness.options(__doc__, arguments, repeats=5)
    keep_freed_memory()  # as a run does; here for all models
    compare_steps(options)
    compare_meta_tokens(options)


def compare_steps(options: harness.Options) -> None:
    """Compare the step with that of other models, in each dtype."""
    texts, length, toy = (2, 16, models.TOY) if options.quick else (4, 512, {})
    rows: list[dict[str, harness.Cell]] = []
    for dtype in options.dtypes:
        hymba, falcon, llama = (
            make(options.device, dtype, **toy) for make in (models.hymba, models.falcon_h1, models.llama)
        )
        ids = models.random_ids(hymba, texts, length)
        own = models.training_step(hymba, ids, skip_logits=True)
        ways = {
            "hymba": own,
            "hymba, torch scan": with_scan("torch", own),
            "its linear layers alone": models.linear_layers(hymba, texts * length),
            "falcon-h1": models.training_step(falcon, ids),
            "llama": models.training_step(llama, ids),
        }
        sizes = dict(zip(ways, map(models.millions, (hymba, hymba, hymba, falcon, llama)), strict=True))
        timings = harness.interleave(ways, options.repeats)
        rows += [
            {
                "dtype": harness.short(dtype),
                "step": name,
                "M weights": sizes[name],
                **timing.cells(),
                "tokens/s": texts * length / timing.median,
                "x falcon-h1": timings["falcon-h1"].over(timing),
                "x linear": timing.over(timings["its linear layers alone"]),
            }
            for name, timing in timings.items()
        ]
    notes = [
        f"{texts} rows of {length} tokens, full attention for Falcon-H1 and Llama; no optimizer, no cache.",
        "x falcon-h1: speed relative to Falcon-H1. x linear: time relative to the linear layers alone.",
        "Hymba's loss computes logits in chunks, as in its trainer; the others compute them at once, as in theirs.",
    ]
    harness.report("train_step", list(rows[0]), rows, notes, options)


def with_scan(backend: str, step: Step) -> Step:
    """The step with another backend of the scan."""

    def step_with_backend() -> None:
        before = use_kernels(scan=backend)
        try:
            step()
        finally:
            use_kernels(**before)

    return step_with_backend


def compare_meta_tokens(options: harness.Options) -> None:
    """Compare 128 meta tokens computed once for 16 texts of 128 tokens, and in each row."""
    texts, length, changes = (2, 8, models.TOY) if options.quick else (16, 128, {})
    lengths = [length] * texts
    rows: list[dict[str, harness.Cell]] = []
    for dtype in options.dtypes:
        once = models.hymba(options.device, dtype, **changes | {"num_memory_tokens": length})
        in_rows = models.MetaTokensInRows(once)
        ids = models.random_ids(once, sum(lengths))
        losses: dict[str, tuple[nn.Module, partial[Tensor]]] = {
            "once a batch": (once, partial(models.packed_loss, once, ids, lengths)),
            "once a row": (in_rows, partial(in_rows, ids, lengths)),
        }
        ways = {name: models.backward_of(loss, model) for name, (model, loss) in losses.items()}
        timings = harness.interleave(ways, options.repeats)
        rows += [
            {
                "dtype": harness.short(dtype),
                "meta tokens": name,
                "loss": losses[name][1]().item(),
                **timing.cells(),
                "text tokens/s": sum(lengths) / timing.median,
                "x faster": timings["once a row"].over(timing),
            }
            for name, timing in timings.items()
        ]
    notes = [f"{texts} texts of {length} tokens after {length} meta tokens; both losses compute the same function."]
    harness.report("train_step_meta", list(rows[0]), rows, notes, options)


if __name__ == "__main__":
    main()
