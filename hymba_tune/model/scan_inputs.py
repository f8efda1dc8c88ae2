"""The inputs of the selective scan backends.

Glossary: T tokens, S texts, E channels, N size of a channel's state.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ScanInputs(NamedTuple):
    """The validated arguments of `selective_scan`.

    Attributes:
        u: Inputs ``(T, E)`` of any float dtype, which may be columns of a wider matrix.
        dt: Time steps before softplus, ``(T, E)``.
        A: State matrix ``(E, N)``, negative.
        B: Input projections ``(T, N)``.
        C: Output projections ``(T, N)``.
        D: The weight of the skip connection, ``(E,)``.
        z: Gates ``(T, E)``.
        dt_bias: The bias of the time steps, ``(E,)``.
        state: Initial states ``(S, E, N)``, which may be expanded from ``(E, N)``; None for zeros.
        offsets: The index of the first token of each of the S texts, followed by T. A text may be empty.
        fuses_meta_prefix: Whether the texts after the first start from its final state; ``state`` is then None.
    """

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    state: Tensor | None
    offsets: tuple[int, ...]
    fuses_meta_prefix: bool = False

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return the inputs that are tensors or None."""
        return self[:9]

    @property
    def lengths(self) -> list[int]:
        """Return the number of tokens of each text."""
        return [end - start for start, end in zip(self.offsets, self.offsets[1:], strict=False)]
