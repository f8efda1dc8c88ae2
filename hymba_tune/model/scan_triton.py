"""The selective scan on a GPU, in Triton: parallel over texts, channels and chunks of time, the same bits every time.

Softplus, skip connection and gate are inside; inputs are read where they lie, each in its own dtype, and the state is
float32. The backward is written by hand and keeps one state for every `CHUNK` tokens. The block sizes follow from the
registers that the compiled kernels use; they have not been timed on a GPU.

Forward, a sweep over all chunks finds what each adds to a state, a short one over the chunks of each text carries the
states from chunk to chunk, and a second over all chunks computes the outputs. The backward does the same with the
states' gradients, from the last chunk to the first, and then all other gradients.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .scan_inputs import ScanInputs

# By names: transformers copies the modules of code beside weights that are imported so, not those of `from . import`.
from .scan_triton_kernels import (
    INSTALLED,
    INTERPRETED,
    carry,
    chunk_ends,
    front_gradients,
    input_gradients,
    outputs,
)

CHUNK = 16
"""Tokens between two states that the backward starts from, a power of two. It computes the states between again and
holds them, their decays and their gradients: all 255 registers that a thread can have, and some 70 spilled."""
STATES = 1024
"""States that a warp holds in the sweeps, and as many of A: 64 of the 128 registers of a thread."""
GRADIENT_STATES = 64
"""States of one token that a warp holds where the gradients are computed."""
GROUP = 64
"""Channels whose dB and dC a program sums, before the sums of all programs are."""
CARRIED = 16
"""Chunks whose states are read together in carrying them from chunk to chunk, since each read takes long."""
CARRYING = 32
"""Channels of a program that carries."""
OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}
"""A warp alone waits for no other. Fusion is multiplying and adding in one, which Triton means to leave off."""


def triton_unavailable_reason() -> str | None:
    """Why the Triton scan cannot be used on this machine, or None if it can: on a GPU, or interpreted on any device."""
    if not INSTALLED:
        return "triton is not installed; pip install triton"
    if INTERPRETED or torch.cuda.is_available():
        return None
    return "no CUDA or ROCm device was found; with TRITON_INTERPRET=1 in the environment Triton is interpreted, slowly"


def triton_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """The scan of `selective_scan`.

    Args:
        inputs: On a GPU, or on any device where Triton is interpreted.

    Returns:
        y ``(T, E)`` in u's dtype and the final state ``(S, E, N)`` in float32.
    """
    u, dt, A, B, C, D, z, dt_bias, state, offsets, _ = inputs
    u, dt, B, C = (_readable(x) for x in (u, dt, B, C))
    z = None if z is None else _readable(z)
    D, dt_bias = (None if x is None else x.contiguous() for x in (D, dt_bias))
    if state is not None and not state[:1].is_contiguous():
        state = state.contiguous()
    with torch.cuda.device_of(u):
        y, final = _TritonScan.apply(u, dt, A, B, C, D, z, dt_bias, state, offsets)
    return y, final


def _readable(x: Tensor) -> Tensor:
    """With contiguous rows, which columns of a wider matrix have as well."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _TritonScan(torch.autograd.Function):
    """The kernels under autograd."""

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
        offsets: tuple[int, ...],
    ) -> tuple[Tensor, Tensor]:
        starts, _ = _chunks(offsets, CHUNK, u.device)
        exponents = _exponents(A)
        ends, times = _states(starts, exponents)
        rows = {"u_stride": u.stride(0), "dt_stride": dt.stride(0), "B_stride": B.stride(0)}
        grid, sizes = _blocks(starts, A, STATES)
        chunk_ends[grid](u, dt, exponents, B, dt_bias, starts, ends, times, **rows, **sizes)
        fronts, final = _carry(exponents, state, ends, times, offsets)
        rows |= {"C_stride": C.stride(0), "z_stride": 0 if z is None else z.stride(0)}
        y = u.new_empty(u.shape)
        outputs[grid](u, dt, exponents, B, C, D, z, dt_bias, starts, fronts, y, **rows, **sizes)
        ctx.save_for_backward(u, dt, A, B, C, D, z, dt_bias, fronts)
        ctx.offsets, ctx.state_dtype = offsets, None if state is None else state.dtype
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        u, dt, A, B, C, D, z, dt_bias, fronts = ctx.saved_tensors
        dy = torch.zeros_like(u) if dy is None else _readable(dy)
        starts, _ = _chunks(ctx.offsets, CHUNK, u.device)
        exponents = _exponents(A)
        rows = {
            "dt_stride": dt.stride(0),
            "C_stride": C.stride(0),
            "z_stride": 0 if z is None else z.stride(0),
            "dy_stride": dy.stride(0),
        }
        # What each chunk adds to the gradient of the state in front of it; the memory then serves for the chunks' dA.
        dA, times = _states(starts, exponents)
        grid, sizes = _blocks(starts, A, STATES)
        front_gradients[grid](dt, exponents, C, z, dt_bias, dy, starts, dA, times, **rows, **sizes)
        d_final = None if d_final is None else d_final.contiguous()
        behind, d_state = _carry(exponents, d_final, dA, times, ctx.offsets, backwards=True)

        rows |= {"u_stride": u.stride(0), "B_stride": B.stride(0)}
        (chunks, blocks), sizes = _blocks(starts, A, GRADIENT_STATES)
        sizes |= {"L": CHUNK, "BLOCKS": max(1, GROUP // sizes["BLOCK_E"])}
        groups = -(-blocks // sizes["BLOCKS"])
        du, ddt, dz = (None if x is None else x.new_empty(x.shape) for x in (u, dt, z))
        dB, dC = exponents.new_empty(2, len(u), groups, A.shape[1])
        dD, ddt_bias = (None if x is None else torch.empty_like(times) for x in (D, dt_bias))
        given = (u, dt, exponents, B, C, D, z, dt_bias, dy, starts, fronts, behind)
        taken = (du, ddt, dA, dB, dC, dD, dz, ddt_bias)
        input_gradients[chunks, groups](*given, *taken, **rows, **sizes)
        return (
            du,
            ddt,
            dA.sum(0).t().to(A.dtype),
            dB.sum(1).to(B.dtype),
            dC.sum(1).to(C.dtype),
            None if dD is None else dD.sum(0).to(D.dtype),
            dz,
            None if ddt_bias is None else ddt_bias.sum(0).to(dt_bias.dtype),
            None if ctx.state_dtype is None else d_state.to(ctx.state_dtype),
            None,
        )


def _exponents(A: Tensor) -> Tensor:
    """``(N, E)`` for exp2."""
    return (A.float() * math.log2(math.e)).t().contiguous()


def _states(starts: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for a state and for a sum of time steps, of each chunk."""
    chunks = len(starts) - 1
    return exponents.new_empty(chunks, *exponents.shape), exponents.new_empty(chunks, exponents.shape[1])


def _blocks(starts: Tensor, A: Tensor, states: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid of a sweep over the chunks, by warps that hold that many states."""
    channels, width = A.shape
    block_n = 1 << (width - 1).bit_length()
    block_e = max(1, states // block_n)
    sizes = {"E": channels, "N": width, "BLOCK_N": block_n, "BLOCK_E": block_e}
    return (len(starts) - 1, -(-channels // block_e)), sizes | OPTIONS


def _carry(
    exponents: Tensor,
    initial: Tensor | None,
    added: Tensor,
    times: Tensor,
    offsets: tuple[int, ...],
    *,
    backwards: bool = False,
) -> tuple[Tensor, Tensor]:
    """What reaches each chunk ``(chunks, N, E)``, and what leaves each text ``(S, E, N)``."""
    _, firsts = _chunks(offsets, CHUNK, exponents.device)
    texts, (width, channels) = len(offsets) - 1, exponents.shape
    carried, final = torch.empty_like(added), exponents.new_empty(texts, channels, width)
    grid = (texts, -(-channels // CARRYING), width)
    carry[grid](
        exponents,
        initial,
        firsts,
        added,
        times,
        carried,
        final,
        initial_stride=0 if initial is None else initial.stride(0),
        E=channels,
        N=width,
        BLOCK=CARRIED,
        BLOCK_E=CARRYING,
        BACKWARDS=backwards,
        **OPTIONS,
    )
    return carried, final


@lru_cache(maxsize=16)  # every layer asks for the same
def _chunks(offsets: tuple[int, ...], chunk: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first row of each chunk, and T; the first chunk of each text, and their number. No chunk spans two texts."""
    starts: list[int] = []
    firsts = []
    for first, last in pairwise(offsets):
        firsts.append(len(starts))
        starts.extend(range(first, last, chunk))
    return (
        torch.tensor([*starts, offsets[-1]], dtype=torch.int32, device=device),
        torch.tensor([*firsts, len(starts)], dtype=torch.int32, device=device),
    )
