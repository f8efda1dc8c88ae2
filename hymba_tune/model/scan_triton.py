"""The selective scan on a GPU, in Triton. It is deterministic, and parallel over texts, channels and chunks of time.

The kernels include softplus, skip connection and gate. They read the inputs in place, each in its own dtype, and their
state is float32. The backward is written by hand and saves one state for every `CHUNK` tokens. The block sizes follow
from the registers that the compiled kernels use; they have not been timed on a GPU.

The forward has three passes. The first one computes in parallel what each chunk adds to a state. The second one carries
the states of each text from chunk to chunk. The third one computes the outputs of all chunks in parallel. The backward
does the same with the gradients of the states, from the last chunk to the first, and then computes all other gradients.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .documents import to_device
from .scan_inputs import ScanInputs

# With exported code, transformers copies the modules of these imports, but not those of `from . import`.
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
"""The number of tokens between two states that are saved for the backward, a power of two. The backward recomputes the
states between and holds them, their decays and their gradients. This takes all 255 registers of a thread and spills
about 70."""
STATES = 1024
"""The number of states that a warp holds in the passes over chunks, and of elements of A. Together they take 64 of the
128 registers of a thread."""
GRADIENT_STATES = 64
"""The number of states per token that a warp holds while it computes gradients."""
GROUP = 64
"""The number of channels over which one program sums dB and dC; PyTorch then sums over the programs."""
CARRIED = 16
"""The number of chunks whose states the second pass reads together, because each read has a long latency."""
CARRYING = 32
"""The number of channels of a program in the second pass."""
OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}
"""The launch options. A program of one warp needs no synchronization, and multiply-add instructions are fused."""


def triton_unavailable_reason() -> str | None:
    """Return why the Triton scan cannot run on this machine, or None if it can, on a GPU or interpreted."""
    if not INSTALLED:
        return "triton is not installed; pip install triton"
    if INTERPRETED or torch.cuda.is_available():
        return None
    return "no CUDA or ROCm device was found; with TRITON_INTERPRET=1 in the environment Triton is interpreted, slowly"


def triton_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Compute `selective_scan`.

    Args:
        inputs: The inputs on a GPU, or on any device if Triton is interpreted.

    Returns:
        y ``(T, E)`` in u's dtype and the final state ``(S, E, N)`` in float32.
    """
    u, dt, A, B, C, D, z, dt_bias, state, offsets, _ = inputs
    u, dt, B, C = (_readable(x) for x in (u, dt, B, C))
    z = None if z is None else _readable(z)
    D, dt_bias = (None if x is None else x.contiguous() for x in (D, dt_bias))
    if state is not None and not state[:1].is_contiguous():
        state = state.contiguous()

    # Triton launches on the current device, which may be another GPU than that of the inputs.
    with torch.cuda.device_of(u):
        y, final = _TritonScan.apply(u, dt, A, B, C, D, z, dt_bias, state, offsets)
    return y, final


def _readable(x: Tensor) -> Tensor:
    """Return x with contiguous rows; it may be columns of a wider matrix, so that a projection need not be copied."""
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
        ends, times = _empty_states(starts, exponents)

        # The chunks start from zeros here, since the states in front of them are not known yet.
        strides = {"u_stride": u.stride(0), "dt_stride": dt.stride(0), "B_stride": B.stride(0)}
        grid, sizes = _blocks(starts, A, STATES)
        chunk_ends[grid](u, dt, exponents, B, dt_bias, starts, ends, times, **strides, **sizes)
        fronts, final = _carry(exponents, state, ends, times, offsets)

        # The states within a chunk are computed again from its front: storing all would take CHUNK times the memory.
        strides |= {"C_stride": C.stride(0), "z_stride": 0 if z is None else z.stride(0)}
        y = u.new_empty(u.shape)
        outputs[grid](u, dt, exponents, B, C, D, z, dt_bias, starts, fronts, y, **strides, **sizes)

        ctx.save_for_backward(u, dt, A, B, C, D, z, dt_bias, fronts)
        ctx.offsets = offsets
        ctx.state_dtype = None if state is None else state.dtype
        ctx.set_materialize_grads(False)  # otherwise an unused final state would get a gradient of zeros
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        u, dt, A, B, C, D, z, dt_bias, fronts = ctx.saved_tensors
        dy = torch.zeros_like(u) if dy is None else _readable(dy)
        starts, _ = _chunks(ctx.offsets, CHUNK, u.device)
        exponents = _exponents(A)
        strides = {
            "dt_stride": dt.stride(0),
            "C_stride": C.stride(0),
            "z_stride": 0 if z is None else z.stride(0),
            "dy_stride": dy.stride(0),
        }

        # dA first holds what each chunk adds to the gradient of the state in front of it. The carry reads these values
        # before the last kernel writes the dA of each chunk, so that one buffer serves both.
        dA, times = _empty_states(starts, exponents)
        grid, sizes = _blocks(starts, A, STATES)
        front_gradients[grid](dt, exponents, C, z, dt_bias, dy, starts, dA, times, **strides, **sizes)
        d_final = None if d_final is None else d_final.contiguous()
        end_gradients, d_state = _carry(exponents, d_final, dA, times, ctx.offsets, backwards=True)

        # Each program writes sums of its own, which are added below: atomic additions would not be deterministic.
        strides |= {"u_stride": u.stride(0), "B_stride": B.stride(0)}
        (chunks, blocks), sizes = _blocks(starts, A, GRADIENT_STATES)
        sizes |= {"L": CHUNK, "BLOCKS": max(1, GROUP // sizes["BLOCK_E"])}
        groups = -(-blocks // sizes["BLOCKS"])
        du, ddt, dz = (None if x is None else x.new_empty(x.shape) for x in (u, dt, z))
        dB, dC = exponents.new_empty(2, len(u), groups, A.shape[1])
        dD, ddt_bias = (None if x is None else torch.empty_like(times) for x in (D, dt_bias))
        inputs = (u, dt, exponents, B, C, D, z, dt_bias, dy, starts, fronts, end_gradients)
        gradients = (du, ddt, dA, dB, dC, dD, dz, ddt_bias)
        input_gradients[chunks, groups](*inputs, *gradients, **strides, **sizes)

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
    """Return A as ``(N, E)`` for exp2: adjacent threads then read adjacent channels."""
    return (A.float() * math.log2(math.e)).t().contiguous()


def _empty_states(starts: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate a state ``(N, E)`` and a sum of time steps ``(E,)`` for each chunk."""
    chunks = len(starts) - 1
    return exponents.new_empty(chunks, *exponents.shape), exponents.new_empty(chunks, exponents.shape[1])


def _blocks(starts: Tensor, A: Tensor, states: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """Return the grid and the sizes of a pass over the chunks, in which a warp holds that many states."""
    channels, width = A.shape
    # The sizes of Triton's blocks are powers of two.
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
    """Carry states, or gradients backwards, from chunk to chunk.

    Returns:
        The value that reaches each chunk, ``(chunks, N, E)``, and the one at the end of each text, ``(S, E, N)``.
    """
    _, firsts = _chunks(offsets, CHUNK, exponents.device)
    texts = len(offsets) - 1
    width, channels = exponents.shape
    carried = torch.empty_like(added)
    final = exponents.new_empty(texts, channels, width)

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


@lru_cache(maxsize=16)  # every layer has the same chunks
def _chunks(offsets: tuple[int, ...], chunk: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Divide the texts into chunks, none of which spans two texts.

    Returns:
        The first row of each chunk, followed by T; and the first chunk of each text, followed by the number of chunks.
    """
    starts: list[int] = []
    firsts = []
    for begin, end in pairwise(offsets):
        firsts.append(len(starts))
        starts.extend(range(begin, end, chunk))
    return (
        to_device([*starts, offsets[-1]], device, torch.int32),
        to_device([*firsts, len(starts)], device, torch.int32),
    )
