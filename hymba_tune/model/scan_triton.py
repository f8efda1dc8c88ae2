"""The selective scan on a GPU, in Triton. It is deterministic, and parallel over texts, channels and chunks of time.

The kernels include softplus, skip connection and gate. They read the inputs in place, each in its own dtype, and their
state is float32. The backward is written by hand and saves one state for every `CHUNK` tokens. The block sizes are
chosen on the user's card, once for each kind of card.

The forward has three passes. The first one computes in parallel what each chunk adds to a state. The second one carries
the states of each text from chunk to chunk. The third one computes the outputs of all chunks in parallel. The backward
does the same with the gradients of the states, from the last chunk to the first, then computes all other gradients,
and sums those that several programs share. The meta tokens are a text from whose end the others start.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# With exported code, transformers copies the modules of these imports, but not those of `from . import`.
from .documents import to_device
from .scan_inputs import ScanInputs
from .scan_triton_gradient_kernels import front_gradients, input_gradients, sum_chunks, sum_projections
from .scan_triton_kernels import INSTALLED, INTERPRETED, carry, chunk_ends, outputs
from .triton_kernels import OPTIONS

CHUNK = 128
"""The number of tokens between two states that are saved for the backward, a power of two. All passes together read and
write 18.1 + 32.8 bytes a token and channel; inputs and outputs alone are 10 + 18."""
GROUP = 4
"""The number of tokens whose states a program of the backward holds at a time, a power of two."""
CHANNELS = 128
"""The number of channels over which a program of the backward sums dB and dC, before they are added to those of other
programs."""
CARRIED = 16
"""The number of chunks whose states the second pass reads together, because each read has a long latency."""
CARRYING = 32
"""The number of channels of a program in the second pass and in the sums."""
SUMMED = 16
"""The number of tokens of a program that sums dB and dC over programs."""
INPUTS = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "state")
ONE_WARP = OPTIONS | {"num_warps": 1}
"""Those of kernels that are not tuned. A program of one warp needs no synchronization."""


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
    u, dt, A, B, C, D, z, dt_bias, state, offsets, chained = inputs
    u, dt, B, C = (_readable(x) for x in (u, dt, B, C))
    z = None if z is None else _readable(z)
    A = A.contiguous()
    D, dt_bias = (None if x is None else x.contiguous() for x in (D, dt_bias))
    if state is not None and not state[:1].is_contiguous():
        state = state.contiguous()

    # Triton launches on the current device, which may be another GPU than that of the inputs.
    with torch.cuda.device_of(u):
        y, final = _TritonScan.apply(u, dt, A, B, C, D, z, dt_bias, state, _Layout(offsets, chained))
    return y, final


def _readable(x: Tensor) -> Tensor:
    """Return x with contiguous rows; it may be columns of a wider matrix, so that a projection need not be copied."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _Layout(NamedTuple):
    """The offsets of the texts, and whether those after the first start from its end."""

    offsets: tuple[int, ...]
    chained: bool


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
        layout: _Layout,
    ) -> tuple[Tensor, Tensor]:
        chunks = _chunks(layout, CHUNK, u.device)
        sizes = _sizes(A)
        strides = {"u_stride": u.stride(0), "dt_stride": dt.stride(0), "B_stride": B.stride(0)}

        # The chunks start from zeros here, since the states in front of them are not known yet.
        ends, times = _empty_states(chunks, A)
        inputs = (u, dt, A, B, dt_bias, chunks.starts, chunks.carried)
        chunk_ends[_grid(chunks.carried, sizes)](*inputs, ends, times, **strides, **sizes)
        final = ends.new_empty(len(layout.offsets) - 1, *A.shape)
        fronts = _carry(A, state, ends, times, final, chunks, layout.chained)

        # The states within a chunk are computed again from its front: storing all would take CHUNK times the memory.
        strides |= {"C_stride": C.stride(0), "z_stride": 0 if z is None else z.stride(0)}
        y = u.new_empty(u.shape)
        layout_and_fronts = (chunks.starts, chunks.ending, fronts)
        grid = _grid(chunks.ending, sizes)
        outputs[grid](u, dt, A, B, C, D, z, dt_bias, *layout_and_fronts, y, final, **strides, **sizes)

        ctx.save_for_backward(u, dt, A, B, C, D, z, dt_bias, fronts)
        ctx.layout = layout
        ctx.state_dtype = None if state is None else state.dtype
        ctx.set_materialize_grads(False)  # otherwise an unused final state would get a gradient of zeros
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        u, dt, A, B, C, D, z, dt_bias, fronts = ctx.saved_tensors
        wanted = dict(zip(INPUTS, ctx.needs_input_grad[:-1], strict=True))
        dy = torch.zeros_like(u) if dy is None else _readable(dy)
        chunks = _chunks(ctx.layout, CHUNK, u.device)
        sizes = _sizes(A)
        strides = {
            "dt_stride": dt.stride(0),
            "C_stride": C.stride(0),
            "z_stride": 0 if z is None else z.stride(0),
            "dy_stride": dy.stride(0),
        }

        added, times = _empty_states(chunks, A)
        reaches_states = wanted["state"] or ctx.layout.chained
        needed = chunks.every if reaches_states else chunks.carried_back
        inputs = (dt, A, C, z, dt_bias, dy, chunks.starts, needed)
        front_gradients[_grid(needed, sizes)](*inputs, added, times, **strides, **sizes)
        d_state = added.new_empty(len(ctx.layout.offsets) - 1, *A.shape) if reaches_states else None
        d_final = None if d_final is None else d_final.contiguous()
        end_gradients = _carry(A, d_final, added, times, d_state, chunks, ctx.layout.chained, backwards=True)

        # Each program writes sums of its own, which are added below: atomic additions would not be deterministic.
        du, ddt, dz = (None if x is None else x.new_empty(x.shape) for x in (u, dt, z))
        sizes |= {"L": GROUP, "GROUPS": CHUNK // GROUP, "CHANNELS": CHANNELS}
        programs = -(-sizes["E"] // CHANNELS)
        B_sums, C_sums = times.new_empty(2, len(u), programs, A.shape[1])
        sums = {"A": added, "D": times, "dt_bias": times}
        A_sums, D_sums, bias_sums = (torch.empty_like(x) if wanted[name] else None for name, x in sums.items())
        strides |= {"u_stride": u.stride(0), "B_stride": B.stride(0)}
        states = (chunks.starts, fronts, end_gradients)
        gradients = (du, ddt, A_sums, B_sums, C_sums, D_sums, dz, bias_sums)
        grid = len(chunks.ending), programs
        input_gradients[grid](u, dt, A, B, C, D, z, dt_bias, dy, *states, *gradients, **strides, **sizes)

        dB, dC = _sum_projections(B_sums, C_sums, B, C)
        dA, dD, ddt_bias = _sum_chunks(A_sums, D_sums, bias_sums, A, D, dt_bias)
        d_state = d_state.to(ctx.state_dtype) if d_state is not None and wanted["state"] else None
        return du, ddt, dA, dB, dC, dD, dz, ddt_bias, d_state, None


class _Chunks(NamedTuple):
    """The chunks of the texts, none of which spans two texts.

    Attributes:
        starts: The first row of each chunk, followed by T.
        firsts: The first chunk of each text, followed by the number of chunks.
        ending: For each chunk, the text that ends with it, or -1.
        every: The numbers of all chunks.
        carried: The chunks from whose end other chunks continue.
        carried_back: The chunks that continue from the end of others in the same text.
    """

    starts: Tensor
    firsts: Tensor
    ending: Tensor
    every: Tensor
    carried: Tensor
    carried_back: Tensor


@lru_cache(maxsize=16)  # every layer has the same chunks
def _chunks(layout: _Layout, chunk: int, device: torch.device) -> _Chunks:
    """Divide the texts into chunks."""
    starts: list[int] = []
    firsts: list[int] = []
    ending: list[int] = []
    for text, (begin, end) in enumerate(pairwise(layout.offsets)):
        firsts.append(len(starts))
        starts.extend(range(begin, end, chunk))
        ending.extend([-1] * (len(starts) - len(ending)))
        if begin < end:
            ending[-1] = text

    every = range(len(starts))
    carried = [i for i in every if ending[i] < 0 or (layout.chained and ending[i] == 0)]
    following = {*every} - {*firsts}
    firsts.append(len(starts))
    starts.append(layout.offsets[-1])
    lists = (starts, firsts, ending, every, carried, sorted(following))
    return _Chunks(*(to_device([*numbers], device, torch.int32) for numbers in lists))


def _empty_states(chunks: _Chunks, A: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate a state ``(N, E)`` and a sum of time steps ``(E,)`` for each chunk."""
    channels, width = A.shape
    number = len(chunks.every)
    states = torch.empty(number, width, channels, dtype=torch.float32, device=A.device)
    return states, states.new_empty(number, channels)


def _sizes(A: Tensor) -> dict[str, Any]:
    """Return the sizes that the passes over chunks share."""
    channels, width = A.shape
    return {"E": channels, "N": width, "BLOCK_N": _power_of_two(width), "CARD": _card(A.device), **OPTIONS}


def _power_of_two(width: int) -> int:
    """Return the size of a block of Triton for a width, the next power of two."""
    return 1 << (width - 1).bit_length()


@lru_cache
def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _grid(chunks: Tensor, sizes: dict[str, Any]) -> Callable[[dict[str, Any]], tuple[int, int]]:
    """Return the programs of a pass over some chunks, by the block sizes that are chosen for it."""

    def programs(chosen: dict[str, Any]) -> tuple[int, int]:
        every = sizes | chosen
        return len(chunks), -(-every["E"] // max(1, every["STATES"] // every["BLOCK_N"]))

    return programs


def _carry(
    A: Tensor,
    initial: Tensor | None,
    added: Tensor,
    times: Tensor,
    last: Tensor | None,
    chunks: _Chunks,
    chained: bool,
    *,
    backwards: bool = False,
) -> Tensor:
    """Carry states, or gradients backwards, from chunk to chunk, and write those at the end of the texts to `last`.

    Returns:
        The value that reaches each chunk, ``(chunks, N, E)``.
    """
    channels, width = A.shape
    texts = len(chunks.firsts) - 1
    carried = torch.empty_like(added)
    # The gradient of the text from whose end the others start needs theirs first.
    parts = [range(1, texts), range(1)] if chained and backwards else [range(texts)]
    for part in parts:
        carry[len(part), -(-channels // CARRYING), width](
            A,
            initial,
            chunks.firsts,
            added,
            times,
            carried,
            last,
            begin_text=part.start,
            texts=texts,
            initial_stride=0 if initial is None else initial.stride(0),
            E=channels,
            N=width,
            BLOCK=CARRIED,
            BLOCK_E=CARRYING,
            BACKWARDS=backwards,
            CHAINED=chained,
            **ONE_WARP,
        )
    return carried


def _sum_projections(B_sums: Tensor, C_sums: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Sum dB and dC over the programs, ``(T, programs, N)``."""
    tokens, programs, width = B_sums.shape
    dB, dC = (x.new_empty(x.shape) for x in (B, C))
    sizes = {"N": width, "BLOCK_N": _power_of_two(width), "BLOCK": SUMMED}
    sum_projections[(-(-tokens // SUMMED),)](B_sums, C_sums, dB, dC, tokens, programs, **sizes, **ONE_WARP)
    return dB, dC


def _sum_chunks(
    A_sums: Tensor | None,
    D_sums: Tensor | None,
    bias_sums: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
) -> list[Tensor | None]:
    """Sum the gradients that are wanted over the chunks, their first dimension."""
    sums = (A_sums, D_sums, bias_sums)
    parameters = zip(sums, (A, D, dt_bias), strict=True)
    total = [None if x is None or parameter is None else torch.empty_like(parameter) for x, parameter in parameters]
    if wanted := [len(x) for x in sums if x is not None]:
        channels, width = A.shape
        sizes = {"E": channels, "N": width, "BLOCK_N": _power_of_two(width), "BLOCK_E": CARRYING}
        sum_chunks[(-(-channels // CARRYING),)](*sums, *total, wanted[0], **sizes, **ONE_WARP)
    return total
