"""What a backend of the selective scan is given.

Glossary: T tokens, S texts, E channels, N size of a channel's state.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ScanInputs(NamedTuple):
    """The arguments of `selective_scan`, checked.

    Attributes:
        u: Inputs ``(T, E)``, of any float dtype; rows may be those of a wider matrix.
        dt: Time steps before softplus ``(T, E)``.
        A: ``(E, N)``, negative.
        B: ``(T, N)``.
        C: ``(T, N)``.
        D: ``(E,)``, the weight of the skip connection.
        z: Gates ``(T, E)``.
        dt_bias: ``(E,)``, added to dt.
        state: ``(S, E, N)``, which may be expanded from ``(E, N)``; None for zeros.
        offsets: Where each of the S texts begins among the T tokens, and T. A text may be empty.
        fuses_meta_prefix: Whether the texts after the first begin from its final state; there is no ``state`` then.
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
        """All but where the texts lie."""
        return self[:9]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return [end - start for start, end in zip(self.offsets, self.offsets[1:], strict=False)]
