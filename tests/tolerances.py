"""The table of all tolerances, with the reason for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """The allowed difference between a result and the expected value, with its reason."""

    relative: float
    """The norm of the difference divided by the norm of the expected value, or by one if that is zero."""
    absolute: float
    """The largest difference of one element."""
    reason: str

    def check(self, actual: Tensor, expected: Tensor, what: str = "result") -> None:
        """Fail if the tensors are not this close; the message gives the difference."""
        assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
        difference = actual.double() - expected.double()
        largest = difference.abs().max().item() if difference.numel() else 0.0
        relative = difference.norm().item() / (expected.double().norm().item() or 1.0)
        assert largest <= self.absolute, f"{what}: off by {largest:.2e}; {self.absolute:.0e} allowed"
        assert relative <= self.relative, f"{what}: relative error {relative:.2e}; {self.relative:.0e} allowed"

    def check_all(self, actual: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> None:
        """Check tensors by name; where one is None (no gradient), the other must be None too."""
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            result = actual[name]
            assert (result is None) == (tensor is None), f"{name}: {result}; expected {tensor}"
            if result is not None and tensor is not None:
                self.check(result, tensor, name)


ANY = float("inf")

GOLDEN = Tolerance(5e-6, 1e-4, "NVIDIA's code in float32, which sums in another order; logits and hidden states")
GOLDEN_GRADIENT = Tolerance(5e-5, ANY, "the same through the backward, where small gradients are sums of large terms")
FLOAT64 = Tolerance(1e-10, ANY, "two float64 computations of one formula; rounding stays below 1e-12")
FLOAT32 = Tolerance(2e-5, ANY, "float32 against float64; rounding grows through the layers of a random model")
FLOAT32_GRADIENT = Tolerance(
    4e-4, ANY, "like GOLDEN_GRADIENT; norms over three elements in the small models cancel more"
)
BFLOAT16 = Tolerance(2e-2, ANY, "eight bits of mantissa: 4e-3 per operation, for a few operations")
BFLOAT16_MODEL = Tolerance(8e-2, ANY, "the same through all layers of a random model")

TWINS = {torch.float64: (FLOAT64, FLOAT64), torch.float32: (FLOAT32, FLOAT32_GRADIENT)}
"""The tolerances of results and of gradients between two implementations of one computation, by dtype."""
