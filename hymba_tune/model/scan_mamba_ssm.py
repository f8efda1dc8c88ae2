"""The selective scan of the package mamba-ssm (github.com/state-spaces/mamba): CUDA kernels of Mamba's authors.

The kernels support rows of one length and no initial state. Texts are therefore padded on the right, and each has its
own copy of the meta tokens in front.

Glossary: T tokens, S texts, L length of the longest text, E channels, N size of a channel's state.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from .hub_kernels import hub_kernel
from .scan_inputs import ScanInputs

STANDSTILL = -1e4
"""A time step before softplus that changes no state, because its softplus is zero with any bias."""
OPEN = 1.2784645427610738
"""The gate at which silu is one, so that it does not change the output."""

REASONS = {
    "mamba_ssm": "not installed (pip install 'hymba-tune[mamba]' as hymba-tune doctor says, or kernels)",
    "selective_scan_cuda": "installed without its Mamba-1 scan (rebuild with MAMBA_KEEP_CUDA_BUILD=TRUE)",
}
"""Why the package cannot be used if a module is missing, by module."""


def mamba_ssm_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Compute `selective_scan` without initial states.

    The computation is in float32, or float64 if u is: the kernel requires one dtype for all rows, and time steps need
    float32. mamba-ssm returns final states without a gradient, so they are read as outputs instead: N more steps after
    the padding leave the states unchanged, and step n outputs state n.

    Args:
        inputs: The inputs on a GPU, with N up to 256 and without an initial state.

    Returns:
        y ``(T, E)`` in u's dtype and the final state ``(S, E, N)``.
    """
    try:
        compute = _function()
    except ImportError as error:
        raise RuntimeError(f"mamba-ssm cannot be used: {mamba_ssm_unavailable_reason()}") from error

    wide = torch.promote_types(inputs.u.dtype, torch.float32)
    u, dt, A, B, C = (x.to(wide) for x in inputs[:5])
    D, z, dt_bias = (None if x is None else x.to(wide) for x in (inputs.D, inputs.z, inputs.dt_bias))

    lengths = inputs.lengths
    states = A.shape[1]
    u, dt, B = (_in_rows(x, lengths, states, fill) for x, fill in ((u, 0), (dt, STANDSTILL), (B, 0)))
    z = None if z is None else _in_rows(z, lengths, states, OPEN)
    C = _in_rows(C, lengths, 0, 0)
    C = torch.cat([C, torch.eye(states, dtype=wide, device=C.device).expand(len(lengths), -1, -1)], -1)

    y: Tensor = compute(u, dt, A, B, C, D, z, dt_bias, delta_softplus=True)
    tokens = [row[:, :length].mT for row, length in zip(y.unbind(), lengths, strict=True)]
    # A cache keeps the state and updates it in place, which must neither reach y nor keep it in memory.
    return torch.cat(tokens).to(inputs.u.dtype), y[..., -states:].contiguous()


@cache
def mamba_ssm_unavailable_reason() -> str | None:
    """Return why mamba-ssm's scan cannot be used on this machine, or None if it can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        _function()
    except Exception as error:  # a package built for another PyTorch raises any type of error
        missing_module = isinstance(error, ModuleNotFoundError) and error.name
        return REASONS.get(missing_module or "", f"installed, but cannot be loaded: {error}")
    return None


def _function() -> Callable[..., Tensor]:
    """Return the function of the package, or else of the Hub kernel."""
    try:
        import mamba_ssm  # noqa: F401
        import selective_scan_cuda  # noqa: F401  (later versions build it only on demand)
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ModuleNotFoundError:
        if (kernel := hub_kernel("mamba-ssm")) is None:
            raise
        selective_scan_fn = kernel.ops.selective_scan_interface.selective_scan_fn
    return selective_scan_fn  # type: ignore[no-any-return]


def _in_rows(x: Tensor, lengths: list[int], extra: int, fill: float) -> Tensor:
    """Arrange ``(T, width)`` as ``(S, width, L + extra)``, one row per text, filled on the right."""
    return pad(pad_sequence([*x.split(lengths)], batch_first=True, padding_value=fill).mT, (0, extra), value=fill)
