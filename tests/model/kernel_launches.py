"""One launch of every Triton kernel of the model at the released shape, for `compile_kernels`.

A file of kernels is registered here with a function that calls its operation, forward and backward, on tensors of the
released widths. The numbers of rows are small: sizes in time are not compiled into a kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hymba_tune.model.scan_inputs import ScanInputs
from hymba_tune.model.scan_triton import triton_scan

CHANNELS, STATES, PROJECTED = 3200, 16, 8960
"""The channels of an SSM, the size of a channel's state, and the width of the input projection."""

LAUNCHES: dict[str, Callable[[], None]] = {}
"""By the name of a module in ``hymba_tune/model``, the function that launches all kernels in it."""


def launches(module: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a function that launches all kernels of a module."""

    def register(launch: Callable[[], None]) -> Callable[[], None]:
        LAUNCHES[module] = launch
        return launch

    return register


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return a leaf; the released model trains in bfloat16."""
    return torch.empty(shape, dtype=dtype, requires_grad=True)


@launches("scan_triton_kernels")
def scan() -> None:
    """Launch the scan as the model does: float32 time steps, gates that are columns of the input projection."""
    rows = 256
    u, dt, B, C = (empty(rows, width) for width in (CHANNELS, CHANNELS, STATES, STATES))
    z = empty(rows, PROJECTED)[:, -CHANNELS:]
    A, state = empty(CHANNELS, STATES, dtype=torch.float32), empty(2, CHANNELS, STATES, dtype=torch.float32)
    inputs = ScanInputs(u, dt.float(), A, B, C, empty(CHANNELS), z, None, state, (0, 240, rows))
    torch.cat([x.float().flatten() for x in triton_scan(inputs)]).sum().backward()
