"""Weights in fewer bits: models quantised in memory, and what that costs them. Knows nothing of training."""

from hymba_tune.quant.damage import Drift, compare, refer, weight_errors
from hymba_tune.quant.quantising import check_quantisable, quantise
from hymba_tune.quant.record import Damage, damage_page
from hymba_tune.quant.search import Search, Trial, quantised_only, search

__all__ = [
    "Damage",
    "Drift",
    "Search",
    "Trial",
    "check_quantisable",
    "compare",
    "damage_page",
    "quantise",
    "quantised_only",
    "refer",
    "search",
    "weight_errors",
]
