"""The damage of quantizing a model, as JSON and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hymba_tune import __version__
from hymba_tune.config import Scheme
from hymba_tune.evaluate.texts import TextCounts
from hymba_tune.pages import LIGHT, Plot, plot, render
from hymba_tune.quant.damage import KindError, QuantizationDrift

LIBRARIES = ("torch", "transformers", "bitsandbytes")


@dataclass(frozen=True)
class Damage:
    """The damage of quantizing a model.

    Attributes:
        model: The name that the user gave.
        scheme: The quantization scheme of the weights.
        dtype: The dtype of computation and of the weights that are not quantized.
        kept: The reasons why modules are not quantized, by the ends of their names.
        kinds: The errors of the quantized modules, by kind.
        drift: The drift of the predictions.
        data: The names of the texts of the measurement.
        texts: The counts of these texts.
        weight_bytes: The bytes of the weights in memory, before and after.
        file_bytes: The bytes of the weight files, before (with adapters) and after.
    """

    model: str
    scheme: Scheme
    dtype: str
    kept: dict[str, str]
    kinds: dict[str, KindError]
    drift: QuantizationDrift
    data: Sequence[str]
    texts: TextCounts
    weight_bytes: tuple[int, int]
    file_bytes: tuple[int, int]

    def facts(self) -> dict[str, Any]:
        """Return the content of ``damage.json``, in nats per token, shares and bytes."""
        drift = self.drift
        return {
            "model": self.model,
            "scheme": str(self.scheme),
            "dtype": self.dtype,
            "data": {"names": list(self.data)} | asdict(self.texts),
            "kl": drift.kl,
            "loss": {"before": drift.loss_before, "after": drift.loss_after},
            "perplexity": {"before": drift.perplexity_before, "after": drift.perplexity_after, "rise": drift.rise},
            "same_likeliest": drift.same,
            "kinds": {kind: asdict(error) for kind, error in self.kinds.items()},
            "kept": self.kept,
            "weight_bytes": dict(zip(("before", "after"), self.weight_bytes, strict=True)),
            "file_bytes": dict(zip(("before", "after"), self.file_bytes, strict=True)),
            "versions": {"hymba-tune": __version__} | {name: version(name) for name in LIBRARIES},
        }

    @property
    def sentence(self) -> str:
        """The main result in one sentence."""
        return f"Perplexity on {', '.join(self.data)}: {' → '.join(self.drift.perplexities)} ({self.drift.risen})."


def damage_page(damage: Damage) -> str:
    """Render ``damage.html``."""
    return render("hymba_tune.quant", "damage.html.j2", damage=damage, plot=_errors(damage.kinds))


def _errors(kinds: dict[str, KindError]) -> Plot:
    errors = {kind: 100 * error.error for kind, error in kinds.items()}

    def draw(axes: Axes) -> None:
        bars = axes.barh(list(errors), list(errors.values()), height=0.6, color=LIGHT["first"])
        axes.bar_label(bars, labels=[f"{error:.3g} %" for error in errors.values()], padding=3, color=LIGHT["ink"])
        axes.invert_yaxis()
        axes.margins(x=0.22)
        axes.set(xlabel="‖W' − W‖ / ‖W‖, per cent")
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))

    worst, best = (choose(errors, key=lambda kind: errors[kind]) for choose in (max, min))
    alt = f"Relative error of weights: most in {worst} ({errors[worst]:.3g} %), least in {best} ({errors[best]:.3g} %)."
    return plot("How far the weights moved, by kind of module", alt, draw)
