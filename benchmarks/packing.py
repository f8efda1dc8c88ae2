"""The cost of padding and of repeated meta tokens, on texts with the lengths of GSM8K.

The batch has 16 texts, whose lengths are evenly spaced quantiles of GSM8K's training rows (gsm8k_lengths.json).
"padded" computes the padding as if it were text, as ordinary batches do; "packed" omits it. The 128 meta tokens are
computed in every row, as in the classic layout, or once per batch. The last line is what this project does.
"""

from __future__ import annotations

import json
from functools import partial

import harness
import models

META = 128
"""Number of meta tokens, that of the released model."""


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    options = harness.options(__doc__, arguments, repeats=3)
    texts, changes = (2, models.TOY) if options.quick else (16, {})
    meta = 4 if options.quick else META
    packed = quantiles(texts)
    padded = [max(packed)] * texts
    rows: list[dict[str, harness.Cell]] = []
    for dtype in options.dtypes:
        once = models.hymba(options.device, dtype, **changes | {"num_memory_tokens": meta})
        in_rows = models.MetaTokensInRows(once)
        ids = models.random_ids(once, sum(padded))
        ways = {}
        computed = {}
        for layout, lengths in {"padded": padded, "packed": packed}.items():
            batch = ids[: sum(lengths)], lengths
            for place, model, loss in (
                ("every row", in_rows, partial(in_rows, *batch)),
                ("once", once, partial(models.packed_loss, once, *batch)),
            ):
                ways[f"{layout}, {place}"] = models.backward_of(loss, model)
                computed[f"{layout}, {place}"] = sum(lengths) + meta * (texts if model is in_rows else 1)
        timings = harness.interleave(ways, options.repeats)
        ordinary = timings["padded, every row"]
        rows += [
            {
                "dtype": harness.short(dtype),
                "batch, meta tokens": name,
                "rows computed": computed[name],
                **timing.cells(),
                "text tokens/s": sum(packed) / timing.median,
                "x faster": ordinary.over(timing),
            }
            for name, timing in timings.items()
        ]
    notes = [f"{texts} texts of {packed[0]} to {packed[-1]} tokens, {sum(packed):,} in total, {meta} meta tokens."]
    harness.report("packing", list(rows[0]), rows, notes, options)


def quantiles(count: int) -> list[int]:
    """The median length of each of ``count`` equal parts of GSM8K's rows, from short to long."""
    histogram = json.loads((harness.HERE / "gsm8k_lengths.json").read_text(encoding="utf-8"))
    lengths = [int(length) for length, texts in histogram["counts"].items() for _ in range(texts)]
    return [lengths[(2 * part + 1) * len(lengths) // (2 * count)] for part in range(count)]


if __name__ == "__main__":
    main()
