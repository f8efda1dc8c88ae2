"""Exports, merges, quantizes and publishes models: written, checked, described, and uploaded to the Hub."""

from hymba_tune.hub.exports import Exported, export
from hymba_tune.hub.merging import Merged, merge
from hymba_tune.hub.quantizing import QuantizedModel, quantize
from hymba_tune.hub.searching import Searched, search_skips

__all__ = ["Exported", "Merged", "QuantizedModel", "Searched", "export", "merge", "quantize", "search_skips"]
