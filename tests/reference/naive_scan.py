"""The selective scan of Mamba, one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus


def naive_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan one text.

    Args:
        u: Inputs, ``(T, E)``.
        dt: Time steps before softplus, ``(T, E)``.
        A: State matrix, ``(E, N)``.
        B: Input projections, ``(T, N)``.
        C: Output projections, ``(T, N)``.
        D: The weight of the skip connection, ``(E,)``.
        z: Gates, ``(T, E)``.
        dt_bias: The bias of the time steps, ``(E,)``.
        initial: The initial state, ``(E, N)``. The default is zeros.

    Returns:
        ``(T, E)`` and the final state ``(E, N)``.
    """
    delta = softplus(dt if dt_bias is None else dt + dt_bias)
    state = torch.zeros_like(A) if initial is None else initial
    outputs = []
    for u_t, delta_t, B_t, C_t in zip(u.unbind(), delta.unbind(), B.unbind(), C.unbind(), strict=True):
        state = torch.exp(delta_t[:, None] * A) * state + torch.outer(delta_t * u_t, B_t)
        outputs.append(state @ C_t)
    y = torch.stack(outputs)
    y = y if D is None else y + D * u
    return (y if z is None else y * silu(z)), state
