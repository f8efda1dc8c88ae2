"""The selective scan of the package mamba-ssm (github.com/state-spaces/mamba): CUDA kernels of Mamba's authors.

It takes rows of one length that begin from zeros, and no initial state: texts are padded on the right, and given meta
tokens of their own in front.

Glossary: T tokens, S texts, L longest text, E channels, N size of a channel's state.
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
"""A time step before softplus after which no state has changed: softplus of it is zero whatever the bias."""
OPEN = 1.2784645427610738
"""The gate that lets everything through: silu of it is one."""

REASONS = {
    "mamba_ssm": "not installed (MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-build-isolation mamba-ssm, or kernels)",
    "selective_scan_cuda": "installed without its Mamba-1 scan (rebuild with MAMBA_KEEP_CUDA_BUILD=TRUE)",
}
"""What the absence of a module means."""


def mamba_ssm_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """The scan of `selective_scan`, without initial states.

    All is computed in float32 (float64 if u is): the kernel takes one type for every row, and the time steps would
    lose too much in a narrower one. mamba-ssm returns final states without a gradient. So they are read as outputs
    instead: N steps behind the padding stand still, and step n reads state n.

    Args:
        inputs: Tensors on a GPU, with N up to 256 and no state.

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
    lengths, states = inputs.lengths, A.shape[1]
    u, dt, B = (_in_rows(x, lengths, states, fill) for x, fill in ((u, 0), (dt, STANDSTILL), (B, 0)))
    z = None if z is None else _in_rows(z, lengths, states, OPEN)
    C = _in_rows(C, lengths, 0, 0)
    C = torch.cat([C, torch.eye(states, dtype=wide, device=C.device).expand(len(lengths), -1, -1)], -1)
    y: Tensor = compute(u, dt, A, B, C, D, z, dt_bias, delta_softplus=True)
    tokens = [row[:, :length].mT for row, length in zip(y.unbind(), lengths, strict=True)]
    return torch.cat(tokens).to(inputs.u.dtype), y[..., -states:]


@cache
def mamba_ssm_unavailable_reason() -> str | None:
    """Why mamba-ssm's scan cannot be used on this machine, or None if it can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        _function()
    except Exception as error:  # a package built for another PyTorch fails in many ways
        absent = isinstance(error, ModuleNotFoundError) and error.name
        return REASONS.get(absent or "", f"installed, but cannot be loaded: {error}")
    return None


def _function() -> Callable[..., Tensor]:
    """From the package, or else from the Hub."""
    try:
        import mamba_ssm  # noqa: F401
        import selective_scan_cuda  # noqa: F401  (which later versions build only on demand)
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ModuleNotFoundError:
        if (kernel := hub_kernel("mamba-ssm")) is None:
            raise
        selective_scan_fn = kernel.ops.selective_scan_interface.selective_scan_fn
    return selective_scan_fn  # type: ignore[no-any-return]


def _in_rows(x: Tensor, lengths: list[int], behind: int, fill: float) -> Tensor:
    """``(T, width)`` as ``(S, width, L + behind)``, a row a text, filled up on the right."""
    return pad(pad_sequence([*x.split(lengths)], batch_first=True, padding_value=fill).mT, (0, behind), value=fill)
