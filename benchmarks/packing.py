"""What padding and repeated meta tokens cost, on texts as long as GSM8K's.

A batch of 16 texts whose lengths are evenly spaced quantiles of those of GSM8K's training rows (gsm8k_lengths.json).
"padded" computes the padding as if it were text, as ordinary batches do; "packed" leaves it out. The 128 meta tokens
are computed in every row, as the classic layout does, or once a batch. The last line is what this project does.
"""

from __future__ import annotations

import json
from functools import partial

import harness
import models

META = 128
"""As many meta tokens as the released model has."""


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    given = harness.options(__doc__, arguments, repeats=3)
    texts, changes = (2, models.TOY) if given.quick else (16, {})
    meta = 4 if given.quick else META
    packed = quantiles(texts)
    padded = [max(packed)] * texts
    rows: list[dict[str, harness.Cell]] = []
    for dtype in given.dtypes:
        once = models.hymba(given.device, dtype, **changes | {"num_memory_tokens": meta})
        in_rows = models.MetaTokensInRows(once)
        ids = models.random_ids(once, sum(padded))
        ways, computed = {}, {}
        for layout, lengths in {"padded": padded, "packed": packed}.items():
            batch = ids[: sum(lengths)], lengths
            for place, model, loss in (
                ("every row", in_rows, partial(in_rows, *batch)),
                ("once", once, partial(models.packed_loss, once, *batch)),
            ):
                ways[f"{layout}, {place}"] = models.backward_of(loss, model)
                computed[f"{layout}, {place}"] = sum(lengths) + meta * (texts if model is in_rows else 1)
        timings = harness.interleave(ways, given.repeats)
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
    notes = [f"{texts} texts of {packed[0]} to {packed[-1]} tokens, {sum(packed):,} in all, {meta} meta tokens."]
    harness.report("packing", list(rows[0]), rows, notes, given)


def quantiles(count: int) -> list[int]:
    """Lengths in the middle of ``count`` equal parts of GSM8K's, from short to long."""
    histogram = json.loads((harness.HERE / "gsm8k_lengths.json").read_text(encoding="utf-8"))
    lengths = [int(length) for length, texts in histogram["counts"].items() for _ in range(texts)]
    return [lengths[(2 * part + 1) * len(lengths) // (2 * count)] for part in range(count)]


if __name__ == "__main__":
    main()
