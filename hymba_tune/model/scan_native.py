"""The selective scan in C++ for the CPU.

The C++ includes softplus, skip connection and gate. It reads the inputs in place, in float32 or bfloat16, and its state
is float32. The backward is written by hand and saves one state for every `CHUNK` tokens.
"""

from __future__ import annotations

import ctypes
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .native import Arguments, Library, Rows, fields, readable, threads_for
from .scan_inputs import ScanInputs
from .scan_native_source import SOURCE

INPUTS = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")
CHUNK = 32
"""The number of tokens between two states that are saved for the backward."""
GROUP = 64
"""The number of channels that a thread processes at a time."""
LIBRARY = Library("scan", SOURCE, CHUNK=CHUNK, GROUP=GROUP)


def native_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Compute `selective_scan` on the CPU, in float32 or bfloat16.

    Args:
        inputs: The inputs on the CPU.

    Returns:
        y ``(T, E)`` in u's dtype and the final state ``(S, E, N)`` in float32.

    Raises:
        RuntimeError: If the native scan cannot run on this machine.
    """
    u, dt, A, B, C, D, z, dt_bias, state, offsets, fuses_meta_prefix = inputs
    u, dt, B, C = (readable(x) for x in (u, dt, B, C))
    z = None if z is None else readable(z)
    A = A.float().contiguous()
    D, dt_bias = (None if x is None else x.float().contiguous() for x in (D, dt_bias))
    if state is not None:
        state = state.float()
        state = state if state[:1].is_contiguous() else state.contiguous()
    texts = TextLayout(offsets, fuses_meta_prefix)
    y, final = _NativeScan.apply(u, dt, A, B, C, D, z, dt_bias, state, texts, torch.is_grad_enabled())
    return y, final


class TextLayout(NamedTuple):
    """The offsets of the texts, and whether those after the first continue from its final state."""

    offsets: tuple[int, ...]
    fuses_meta_prefix: bool


class _NativeScan(torch.autograd.Function):
    """The C++ under autograd; ``differentiable`` tells whether a backward may follow."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        state: Tensor | None,
        texts: TextLayout,
        differentiable: bool,
    ) -> tuple[Tensor, Tensor]:
        chunk_states = None
        if differentiable and any(ctx.needs_input_grad):
            chunks = sum(-(-(end - start) // CHUNK) for start, end in pairwise(texts.offsets))
            chunk_states = A.new_empty(chunks, _groups(u) * GROUP, A.shape[1])

        y = u.new_empty(u.shape)
        final = A.new_empty(len(texts.offsets) - 1, *A.shape)
        inputs = (u, dt, A, B, C, D, z, dt_bias)
        named = dict(zip(INPUTS, inputs, strict=True))
        stride = 0 if state is None else state.stride(0)
        outputs = {"chunk_states": chunk_states, "y": y, "final": final}
        _call("forward", texts, **named, initial=state, initial_stride=stride, **outputs)

        ctx.save_for_backward(*inputs, chunk_states)
        ctx.texts = texts, state is not None
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, chunk_states = ctx.saved_tensors
        texts, has_state = ctx.texts
        u, _, A, B, *_ = inputs

        grads = [None if x is None else x.new_empty(x.shape) for x in inputs]
        d_state = A.new_empty(len(texts.offsets) - 1, *A.shape)
        dB_groups, dC_groups = A.new_empty(2, _groups(u), *B.shape)
        _call(
            "backward",
            texts,
            **dict(zip(INPUTS, inputs, strict=True)),
            **{f"d{name}": grad for name, grad in zip(INPUTS, grads, strict=True)},
            chunk_states=chunk_states,
            dy=None if dy is None else readable(dy),
            d_final=None if d_final is None else d_final.contiguous(),
            d_initial=d_state,
            dB_groups=dB_groups,
            dC_groups=dC_groups,
        )
        return *grads, d_state if has_state else None, None, None


def _groups(u: Tensor) -> int:
    return -(-u.shape[1] // GROUP)


class _Scan(Arguments):
    """The arguments; the C++ struct `Scan` has the same fields."""

    _fields_ = (
        *fields(ctypes.c_int64, "texts E N threads fuses_meta_prefix"),
        *fields(ctypes.c_void_p, "offsets"),
        *fields(Rows, "u dt B C z y dy du ddt dB dC dz"),
        *fields(ctypes.c_void_p, "A D dt_bias initial"),
        *fields(ctypes.c_int64, "initial_stride"),
        *fields(ctypes.c_void_p, "final chunk_states d_final dA dD ddt_bias d_initial dB_groups dC_groups"),
    )


def _call(function: str, texts: TextLayout, **arguments: Tensor | int | None) -> None:
    """Run the function ``forward`` or ``backward`` of the library."""
    offsets = (ctypes.c_int64 * len(texts.offsets))(*texts.offsets)
    shape = arguments["A"].shape  # type: ignore[union-attr]
    scan = _Scan(
        texts=len(texts.offsets) - 1,
        E=shape[0],
        N=shape[1],
        threads=threads_for(texts.offsets[-1] * shape.numel()),
        fuses_meta_prefix=texts.fuses_meta_prefix,
        offsets=ctypes.addressof(offsets),
        **arguments,
    )
    LIBRARY.call(function, scan)
