"""Weights in fewer bits: models quantised in memory, and what that costs them. Knows nothing of training."""

from hymba_tune.quant.quantising import check_quantisable, quantise

__all__ = ["check_quantisable", "quantise"]
