"""The selective scan in C++ for the CPU.

Softplus, skip connection and gate are inside; inputs are read where they lie, in float32 or bfloat16, and the state is
float32. The backward is written by hand and keeps one state for every `CHUNK` tokens.
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
"""Steps between two states that the backward starts from."""
GROUP = 64
"""Channels a thread takes at a time."""
LIBRARY = Library("scan", SOURCE, CHUNK=CHUNK, GROUP=GROUP)


def native_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """The scan of `selective_scan` on the CPU, in float32 or bfloat16.

    Returns:
        y ``(T, E)`` in u's dtype and the final state ``(S, E, N)`` in float32.

    Raises:
        RuntimeError: If there is no native scan on this machine.
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
    """Where texts begin, and whether those after the first go on from its final state."""

    offsets: tuple[int, ...]
    fuses_meta_prefix: bool


class _NativeScan(torch.autograd.Function):
    """The C++ under autograd; ``differentiable`` is whether a backward may come."""

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
        kept = None
        if differentiable and any(ctx.needs_input_grad):
            chunks = sum(-(-(end - start) // CHUNK) for start, end in pairwise(texts.offsets))
            kept = A.new_empty(chunks, _groups(u) * GROUP, A.shape[1])
        y = u.new_empty(u.shape)
        final = A.new_empty(len(texts.offsets) - 1, *A.shape)
        inputs = (u, dt, A, B, C, D, z, dt_bias)
        named = dict(zip(INPUTS, inputs, strict=True))
        stride = 0 if state is None else state.stride(0)
        _call("forward", texts, **named, initial=state, initial_stride=stride, kept=kept, y=y, final=final)
        ctx.save_for_backward(*inputs, kept)
        ctx.texts = texts, state is not None
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, kept = ctx.saved_tensors
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
            kept=kept,
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
    """The C++'s struct of the same name."""

    _fields_ = (
        *fields(ctypes.c_int64, "texts E N threads fuses_meta_prefix"),
        *fields(ctypes.c_void_p, "offsets"),
        *fields(Rows, "u dt B C z y dy du ddt dB dC dz"),
        *fields(ctypes.c_void_p, "A D dt_bias initial"),
        *fields(ctypes.c_int64, "initial_stride"),
        *fields(ctypes.c_void_p, "final kept d_final dA dD ddt_bias d_initial dB_groups dC_groups"),
    )


def _call(function: str, texts: TextLayout, **arguments: Tensor | int | None) -> None:
    """Run ``forward`` or ``backward`` of the library."""
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
