"""Models that load anywhere: exported, checked, described, and published on the Hugging Face Hub."""

from hymba_tune.hub.exports import Exported, export
from hymba_tune.hub.quantizing import Quantised, quantize

__all__ = ["Exported", "Quantised", "export", "quantize"]
