"""The arguments of the operations of one new token of each text.

Glossary: S texts, W width of the input projection, H query heads, G key/value heads, C columns of a buffer, a width of
a query or key head, v width of a value head, E channels of the SSM, K width of the convolution, N size of a channel's
state, R rank of the time steps.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenInputs(NamedTuple):
    """The arguments of `prepare`.

    Attributes:
        projected: ``(S, W)``: queries, new keys and values (none if the layer reuses those of another), x and the gate.
        head_dim: The width of a query or key head.
        q_norm: The weight of the queries' norm, ``(a,)`` or ``(H, a)``, or None.
        k_norm: The weight of the keys' norm, ``(a,)`` or ``(G, a)``, or None.
        eps: The number added to the mean square.
        tables: The cosines and sines ``(S, 1, a)`` of the new tokens from `rotary_tables`, or None without RoPE.
        key: The buffer of keys, ``(S, G, C, a)``, or None if the layer reuses those of another.
        value: The buffer of values, ``(S, G, C, v)``, or None.
        lengths: ``(S,)`` int64, the number of tokens of each text before the new one.
        conv_weight: ``(E, K)``.
        conv_bias: ``(E,)`` or None.
        tails: The last inputs of the convolution, ``(S, K - 1, E)``.
    """

    projected: Tensor
    head_dim: int
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    tables: tuple[Tensor, Tensor] | None
    key: Tensor | None
    value: Tensor | None
    lengths: Tensor
    conv_weight: Tensor
    conv_bias: Tensor | None
    tails: Tensor

    @property
    def widths(self) -> list[int]:
        """Return the widths of queries, keys, values, x and gate among the columns of the projection."""
        inner = self.conv_weight.shape[0]
        groups = (
            [0, 0] if self.key is None or self.value is None else [x[0, :, 0].numel() for x in (self.key, self.value)]
        )
        return [self.projected.shape[1] - sum(groups) - 2 * inner, *groups, inner, inner]


class StateInputs(NamedTuple):
    """The arguments of `update`.

    Attributes:
        x: The result of the convolution, ``(S, E)``.
        parameters: The projection of x to time steps, B and C, ``(S, R + 2 * N)``.
        gate: ``(S, E)``, which may be columns of a wider matrix.
        dt_norm: The weight of the time steps' norm, ``(R,)``, or None.
        B_norm: The weight of B's norm, ``(N,)``, or None.
        C_norm: The weight of C's norm, ``(N,)``, or None.
        eps: The number added to the mean square.
        dt_weight: The projection of the time steps, ``(E, R)``, which is computed in float32 whatever its dtype.
        dt_bias: ``(E,)`` or None.
        A_log: The logarithm of -A, ``(E, N)``.
        D: The weight of the skip connection, ``(E,)``.
        state: ``(S, E, N)`` in float32 or wider.
    """

    x: Tensor
    parameters: Tensor
    gate: Tensor
    dt_norm: Tensor | None
    B_norm: Tensor | None
    C_norm: Tensor | None
    eps: float
    dt_weight: Tensor
    dt_bias: Tensor | None
    A_log: Tensor
    D: Tensor
    state: Tensor
