"""Quantization of models in memory, and its effect on weights and predictions. It does not depend on training."""

from hymba_tune.quant.damage import QuantizationDrift, compare, refer, weight_errors
from hymba_tune.quant.quantization import check_quantizable, quantize_model
from hymba_tune.quant.record import Damage, damage_page
from hymba_tune.quant.search import Search, Trial, quantized_only, search

__all__ = [
    "Damage",
    "QuantizationDrift",
    "Search",
    "Trial",
    "check_quantizable",
    "compare",
    "damage_page",
    "quantize_model",
    "quantized_only",
    "refer",
    "search",
    "weight_errors",
]
