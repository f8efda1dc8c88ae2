"""A training step of Hymba beside Falcon-H1's, Llama's, and that of its own linear layers alone.

Forward, loss on every token and backward to all weights of a 15.75M-parameter model, 4 x 512 tokens. A second table
has the meta tokens computed once a batch, and once a row as the classic layout does.
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
    given = harness.options(__doc__, arguments, repeats=5)
    keep_freed_memory()  # as a run does, here for all of them
    compare_steps(given)
    compare_meta_tokens(given)


def compare_steps(given: harness.Options) -> None:
    """The step in each number format, against others'."""
    texts, length, toy = (2, 16, models.TOY) if given.quick else (4, 512, {})
    rows: list[dict[str, harness.Cell]] = []
    for dtype in given.dtypes:
        hymba, falcon, llama = (
            make(given.device, dtype, **toy) for make in (models.hymba, models.falcon_h1, models.llama)
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
        timings = harness.interleave(ways, given.repeats)
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
        "x falcon-h1: how many times its speed. x linear: how many times the linear layers' time.",
        "Hymba's loss makes its logits in chunks, as its trainer does; the others make them all, as theirs do.",
    ]
    harness.report("train_step", list(rows[0]), rows, notes, given)


def with_scan(backend: str, step: Step) -> Step:
    """The step with that backend of the scan."""

    def stepped() -> None:
        before = use_kernels(scan=backend)
        try:
            step()
        finally:
            use_kernels(**before)

    return stepped


def compare_meta_tokens(given: harness.Options) -> None:
    """128 meta tokens computed once for 16 texts of 128, or in each row."""
    texts, length, changes = (2, 8, models.TOY) if given.quick else (16, 128, {})
    lengths = [length] * texts
    rows: list[dict[str, harness.Cell]] = []
    for dtype in given.dtypes:
        once = models.hymba(given.device, dtype, **changes | {"num_memory_tokens": length})
        in_rows = models.MetaTokensInRows(once)
        ids = models.random_ids(once, sum(lengths))
        losses: dict[str, tuple[nn.Module, partial[Tensor]]] = {
            "once a batch": (once, partial(models.packed_loss, once, ids, lengths)),
            "once a row": (in_rows, partial(in_rows, ids, lengths)),
        }
        ways = {name: models.backward_of(loss, model) for name, (model, loss) in losses.items()}
        timings = harness.interleave(ways, given.repeats)
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
    notes = [f"{texts} texts of {length} tokens behind {length} meta tokens; both losses are one function's."]
    harness.report("train_step_meta", list(rows[0]), rows, notes, given)


if __name__ == "__main__":
    main()
