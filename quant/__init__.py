"""Weights in fewer bits: models quantised in memory, and what that costs them. Knows nothing of training."""

from hymba_tune.quant.damage import compare, refer, weight_errors
from hymba_tune.quant.quantising import check_quantisable, quantise
from hymba_tune.quant.record import Damage, damage_page

__all__ = ["Damage", "check_quantisable", "compare", "damage_page", "quantise", "refer", "weight_errors"]
