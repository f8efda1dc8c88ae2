"""The measures of a run, and how their values are written."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hymba_tune.config import Verb


@dataclass(frozen=True)
class Measure:
    """A column of ``metrics.jsonl``.

    Attributes:
        title: The measure's name.
        unit: The unit, as an axis shows it.
        format: The format of a value in a sentence.
        scale: The divisor of values.
        chance: The value of guessing, where it is known.
        better: -1 where a lower value is better, 1 where a higher one is, 0 where neither is.
    """

    title: str
    unit: str = ""
    format: str = ".3g"
    scale: float = 1.0
    chance: float | None = None
    better: int = 0

    def written(self, value: float) -> str:
        """Format a value with its unit."""
        unit = {"": "", "%": " %"}.get(self.unit, f" {self.unit}")
        return f"{value / self.scale:{self.format}}{unit}"


KNOWN = {
    "bits_per_byte": Measure("Bits per byte", "bits a byte", ".3f", better=-1),
    "cross_entropy": Measure("Cross-entropy on the data", "nats a token", ".3f", better=-1),
    "distillation": Measure("Distance from the teacher", "nats a token", ".3f", better=-1),
    "chunk_likelihood": Measure("Distance from the teacher, by chunks", format=".3f", better=-1),
    "hidden_states": Measure("Distance from the teacher's hidden states", format=".3f", better=-1),
    "accuracy": Measure("Accuracy", "%", ".0f", scale=0.01, better=1),
    "margin": Measure("Margin of rewards", format=".3f", better=1),
    "chosen_reward": Measure("Reward of chosen answers", format=".3f"),
    "rejected_reward": Measure("Reward of rejected answers", format=".3f"),
    "reward": Measure("Reward of answers", format=".3f", better=1),
    "equal_groups": Measure("Groups of equal rewards, which teach nothing", "%", ".0f", scale=0.01),
    "answer_tokens": Measure("Length of answers", "tokens", ",.1f"),
    "cut_answers": Measure("Answers cut at the maximum length", "%", ".0f", scale=0.01, better=-1),
    "entropy": Measure("Entropy of the next token", "nats", ".3f"),
    "kl": Measure("KL divergence from the start", "nats a token", ".3g"),
    "clipped": Measure("Tokens with a clipped ratio", "%", ".1f", scale=0.01),
    "learning_rate": Measure("Learning rate", format=".2g"),
    "grad_norm": Measure("Gradient norm, before clipping"),
    "tokens_per_s": Measure("Speed", "tokens/s", ",.0f", better=1),
    "memory_bytes": Measure("Peak memory", "GB", ".2f", scale=2**30, better=-1),
}
"""Measures in the order in which they are shown, after the loss."""


def order(name: str) -> float:
    """Return the sort key of a measure: the loss, then measures without a description, then those of the machine."""
    names = list(KNOWN)
    if name.partition("/")[0] == "loss":
        return -1
    return names.index(name) if name in names else names.index("learning_rate") - 0.5


def measure(name: str, verb: Verb | None) -> Measure:
    """Describe a column of metrics.jsonl.

    Args:
        name: The column. The held-out loss of one source of several is ``loss/`` and the source's name.
        verb: The verb of the run; None where runs of several verbs are compared.

    Returns:
        The measure; a column without a description gets its name as the title.
    """
    what, _, source = name.partition("/")
    if what == "loss":
        title = f"Loss on {source}" if source else "Loss"
        return Measure(title, verb.loss_unit if verb else "", ".3f", better=-1)
    if what == "reward" and source:
        return replace(KNOWN["reward"], title=f"Reward by {source}")
    if name == "accuracy" and verb and verb.accuracy:
        title = f"{verb.accuracy.subject} {verb.accuracy.verdict}".capitalize()
        return replace(KNOWN[name], title=title, chance=verb.accuracy.chance)
    return KNOWN.get(name) or Measure(name.replace("_", " ").capitalize())
