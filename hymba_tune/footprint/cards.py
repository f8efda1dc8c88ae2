"""Common GPUs and the links between them, by the figures of their manufacturers.

Sources: NVIDIA's data sheets, and for GeForce cards the white paper of the Ada architecture: products that sum in
float32, without sparsity. Data sheets state links as the sum of both directions; here is what one direction carries.
Nothing of this has been measured here.
"""

from __future__ import annotations

from dataclasses import dataclass

from hymba_tune.footprint.traffic import Network
from hymba_tune.footprint.work import Speeds

MATRIX_SHARE = 0.7
"""The share of a GPU's operations that matrix products are assumed to reach."""
MEMORY_SHARE = 0.8
"""The share of a GPU's memory bandwidth that kernels are assumed to reach."""
LAUNCH = 6e-6
"""Seconds that PyTorch is assumed to take on the host for a kernel, with autograd."""


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: Its name.
        tflops: TFLOP/s (10^12) of dense products in bfloat16.
        link: GB/s (10^9) that it sends to other GPUs of its machine: over PCIe 4.0, with 8 lanes in an RTX 4060 and 16
            in others, or over NVLink, 300 in an A100 and 450 in an H100.
        memory: GB/s (10^9) that it reads from its memory.
    """

    name: str
    tflops: float
    link: float
    memory: float

    @property
    def speeds(self) -> Speeds:
        """What it is assumed to reach."""
        return Speeds(self.tflops * 1e12 * MATRIX_SHARE, self.memory * 1e9 * MEMORY_SHARE, LAUNCH)

    def network(self, between: float, devices: int) -> Network:
        """Return the network of machines with this GPU.

        Args:
            between: GB/s that a machine sends to others, over all its ports.
            devices: The GPUs of a machine.
        """
        return Network(self.link * 1e9, between * 1e9, devices)


CARDS = {
    8: Card("RTX 4060", 30, 16, 272),
    12: Card("RTX 4070", 58, 32, 504),
    16: Card("RTX 4080", 97, 32, 717),
    24: Card("RTX 4090", 165, 32, 1008),
    48: Card("L40S", 362, 32, 864),
    80: Card("A100", 312, 300, 1935),
}
"""GPUs that a plan lists, by their GB."""
H100 = Card("H100", 989, 450, 3350)
PCIE = 32.0
"""GB/s of PCIe 4.0 with 16 lanes: what is assumed of a GPU whose links are not known."""
ETHERNET, INFINIBAND = 12.5, 50.0
"""GB/s of a port of Ethernet with 100 Gb/s, and of InfiniBand NDR with 400 Gb/s, of which a DGX H100 has one a GPU."""
