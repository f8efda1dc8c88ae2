"""What a run measures, and how that is written."""

from __future__ import annotations

from dataclasses import dataclass

LOSS_OF = {"dpo": "a pair", "kto": "an answer"}
"""What the loss of a verb is the mean of, where that is not a token."""


@dataclass(frozen=True)
class Measure:
    """A column of ``metrics.jsonl``.

    Attributes:
        title: What it is.
        unit: Its unit, as an axis names it.
        format: How a value is written in a sentence.
        scale: What values are divided by.
        better: -1 where less of it is better, 1 where more is, 0 where neither.
    """

    title: str
    unit: str = ""
    format: str = ".3g"
    scale: float = 1.0
    better: int = 0

    def written(self, value: float) -> str:
        """A value with its unit."""
        unit = {"": "", "%": " %"}.get(self.unit, f" {self.unit}")
        return f"{value / self.scale:{self.format}}{unit}"


KNOWN = {
    "accuracy": Measure("Pairs ranked right", "%", ".0f", scale=0.01, better=1),
    "margin": Measure("Margin of preferred answers", "nats", ".3f", better=1),
    "learning_rate": Measure("Learning rate", format=".2g"),
    "grad_norm": Measure("Gradient norm, before clipping"),
    "tokens_per_s": Measure("Speed", "tokens/s", ",.0f", better=1),
    "memory_bytes": Measure("Peak memory", "GB", ".2f", scale=2**30, better=-1),
}
"""In the order in which they are shown, after the loss."""


def order(name: str) -> int:
    """Where a measure stands among the others: those nobody described after the loss, before the machine's."""
    names = list(KNOWN)
    return -1 if name == "loss" else names.index(name) if name in names else names.index("learning_rate")


def measure(name: str, verb: str | None) -> Measure:
    """What a column holds, in a run of a verb, or of any (None); one that nobody described is called by its name."""
    if name == "loss":
        unit = "nats" if verb is None else f"nats {LOSS_OF.get(verb, 'a token')}"
        return Measure("Loss", unit, ".3f", better=-1)
    return KNOWN.get(name) or Measure(name.replace("_", " ").capitalize())
