"""The selective scan of Mamba-1, over texts laid end to end.

    s_t = exp(dt_t A) * s_{t-1} + (dt_t u_t) B_t^T        y_t = s_t C_t + D * u_t        (arXiv 2312.00752, section 3)

Glossary: T tokens, S texts, E channels, N size of a channel's state; u input, dt time step, z gate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, silu, softplus

from .documents import Documents
from .scan_native import DTYPES, native_scan, native_unavailable

CHUNK = 16
"""Steps between two states that the backward starts from; the states between are computed again."""


def packed_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    documents: Documents,
    states: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Scan the meta tokens and every text, each text continuing from the meta tokens or from a cache.

    Args:
        u: ``(M + T, E)``; ``dt``, ``B``, ``C``, ``z`` have as many rows.
        dt: Time steps before softplus.
        A: ``(E, N)``.
        B: Input projections ``(M + T, N)``.
        C: Output projections ``(M + T, N)``.
        D: ``(E,)``.
        z: Gates.
        documents: Where the texts lie.
        states: ``(S, E, N)`` held by a cache; None where the meta tokens are in u.

    Returns:
        ``(M + T, E)`` in u's dtype, and each text's final state ``(S, E, N)`` in float32.
    """
    if states is not None or not documents.num_meta:
        return selective_scan(u, dt, A, B, C, D, z, initial_state=states, cu_seqlens=documents.cu_seqlens)
    rows = [documents.num_meta, documents.starts[-1]]
    (u_meta, u), (dt_meta, dt), (B_meta, B), (C_meta, C), (z_meta, z) = (x.split(rows) for x in (u, dt, B, C, z))
    y_meta, state = selective_scan(u_meta, dt_meta, A, B_meta, C_meta, D, z_meta)
    y, states = selective_scan(u, dt, A, B, C, D, z, initial_state=state[0], cu_seqlens=documents.cu_seqlens)
    return torch.cat([y_meta, y]), states


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The selective scan; everything is differentiable.

    Args:
        u: ``(T, E)``, any float dtype. The state is float32, or float64 if u is.
        dt: ``(T, E)``; ``softplus(dt + dt_bias)`` is the time step.
        A: ``(E, N)``, negative.
        B: ``(T, N)``.
        C: ``(T, N)``.
        D: ``(E,)`` weight of the skip connection.
        z: ``(T, E)`` gate; the output is multiplied by ``silu(z)``.
        dt_bias: ``(E,)``.
        initial_state: ``(E, N)`` for every text or ``(S, E, N)``; zeros when not given.
        cu_seqlens: ``(S + 1,)`` offsets of the texts; one text when not given.
        backend: "reference" (the recurrence, step by step), "torch" (texts side by side, in chunks), "native" (C++ on
            the CPU, float32 and bfloat16), or "auto", the fastest that can.

    Returns:
        y ``(T, E)`` in u's dtype and the final state ``(S, E, N)``.

    Raises:
        ValueError: If a shape or device does not fit u's, or the backend is unknown or cannot take these tensors.
    """
    lengths = _checked_lengths(u, cu_seqlens)
    if initial_state is not None and initial_state.ndim == 2:
        initial_state = initial_state.expand(len(lengths), -1, -1)
    (tokens, channels), states = u.shape, A.shape[-1]
    _check(u.device, (tokens, channels), dt=dt, z=z)
    _check(u.device, (tokens, states), B=B, C=C)
    _check(u.device, (channels, states), A=A)
    _check(u.device, (channels,), D=D, dt_bias=dt_bias)
    _check(u.device, (len(lengths), channels, states), initial_state=initial_state)
    scan = BACKENDS[_choose(backend, u)]
    return scan(u, dt, A, B, C, D, z, dt_bias, initial_state, lengths)


def _checked_lengths(u: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    if cu_seqlens is None:
        return [u.shape[0]]
    offsets: list[int] = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(offsets)]
    if offsets[:1] != [0] or offsets[-1] != u.shape[0] or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens is {offsets}; expected offsets that rise from 0 to the {u.shape[0]} rows of u")
    return lengths


def _check(device: torch.device, shape: tuple[int, ...], **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}; expected {device}, where u is")


def _choose(backend: str, u: Tensor) -> str:
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"scan backend {backend!r}; expected one of auto, {', '.join(BACKENDS)}")
    if backend in ("auto", "native"):
        obstacle = _native_obstacle(u)
        if backend == "native" and obstacle:
            raise ValueError(f"the native scan cannot be used: {obstacle}; auto, reference and torch can")
        return "torch" if obstacle else "native"
    return backend


def _native_obstacle(u: Tensor) -> str | None:
    if u.device.type != "cpu":
        return f"it runs on the CPU, and u is on {u.device}"
    if u.dtype not in DTYPES:
        return f"it takes {' and '.join(map(str, DTYPES))}, and u is {u.dtype}"
    return native_unavailable()


Scan = Callable[..., tuple[Tensor, Tensor]]


def _unfused(recurrence: Scan) -> Scan:
    """A backend from a recurrence alone: time steps, skip connection and gate around it, in float32 or float64."""

    @wraps(recurrence)
    def scan(
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        state: Tensor | None,
        lengths: list[int],
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(u.dtype, torch.float32)
        dtype = u.dtype
        u, dt, A, B, C = (x.to(wide) for x in (u, dt, A, B, C))
        delta = softplus(dt if dt_bias is None else dt + dt_bias.to(wide))
        state = A.new_zeros(len(lengths), *A.shape) if state is None else state.to(wide)
        y, final = recurrence(u, delta, A, B, C, state, lengths)
        y = y if D is None else torch.addcmul(y, u, D.to(wide))
        y = y if z is None else y * silu(z.to(wide))
        return y.to(dtype), final

    return scan


@_unfused
def _reference_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, lengths: list[int]
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, a token at a time."""
    outputs, finals = [], []
    tokens = [iter(x.unbind(0)) for x in (u, delta, B, C)]
    for text, length in zip(state.unbind(0), lengths, strict=True):
        s = text
        for _ in range(length):
            u_t, delta_t, B_t, C_t = (next(x) for x in tokens)
            s = torch.exp(delta_t[:, None] * A) * s + (delta_t * u_t)[:, None] * B_t
            outputs.append(s @ C_t)
        finals.append(s)
    return torch.stack(outputs) if outputs else torch.empty_like(u), torch.stack(finals)


@_unfused
def _chunked_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, lengths: list[int]
) -> tuple[Tensor, Tensor]:
    """All texts side by side, chunk after chunk; only the states between chunks are kept for the backward."""
    y, final = _ChunkedScan.apply(u, delta, A, B, C, state, lengths)
    return y, final


BACKENDS: dict[str, Scan] = {"reference": _reference_scan, "torch": _chunked_scan, "native": native_scan}


class _ChunkedScan(torch.autograd.Function):
    """The scan with texts sorted by length, so that those still running are always the first ones.

    Within a chunk every tensor has a time axis in front: ``(chunk, texts, E, N)`` for what the state is made of. A
    text that ends inside a chunk goes on with a row of zeros behind the tokens: a time step of zero leaves its state
    as it is. Memory is taken once and used by every chunk: fresh memory would cost more than the arithmetic.
    """

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor, lengths: list[int]
    ) -> tuple[Tensor, Tensor]:
        order = sorted(range(len(lengths)), key=lambda text: -lengths[text])
        u, delta, B, C = (_with_zeros(x) for x in (u, delta, B, C))
        y = torch.empty_like(u)
        state = initial[order]
        kept = []
        memory = _memory(2, lengths, A)
        for tokens in _chunks(lengths, order, u.device):
            running = tokens.shape[1]
            kept.append(state[:running].clone())
            states, decay = _shaped(memory, tokens)
            _fill_states(states, decay, kept[-1], u[tokens], delta[tokens], B[tokens], A)
            y[tokens] = _sum_states(torch.mul(states, C[tokens][:, :, None], out=decay))
            state[:running] = states[-1]
        final = torch.empty_like(state)
        final[order] = state
        ctx.save_for_backward(u, delta, A, B, C, *kept)
        ctx.texts = lengths, order
        return y[:-1], final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, *kept = ctx.saved_tensors
        lengths, order = ctx.texts
        dy = _with_zeros(dy)
        du, d_delta, dB, dC = (torch.empty_like(x) for x in (u, delta, B, C))
        dA = torch.zeros_like(A)
        d_state = d_final[order]
        memory = _memory(4, lengths, A)
        chunks = list(_chunks(lengths, order, u.device))
        for tokens, first in zip(reversed(chunks), reversed(kept), strict=True):
            running = tokens.shape[1]
            states, decay, d_states, products = _shaped(memory, tokens)
            u_c, delta_c, B_c, dy_c = u[tokens], delta[tokens], B[tokens], dy[tokens]
            _fill_states(states, decay, first, u_c, delta_c, B_c, A)
            # How y's and the later states' gradients reach each state, from the last step to the first.
            torch.mul(dy_c[..., None], C[tokens][:, :, None], out=d_states)
            d_states[-1] += d_state[:running]
            steps = list(zip(d_states.unbind(), decay.unbind(), strict=True))
            for (d_later, decay_t), (d_earlier, _) in pairwise(reversed(steps)):
                d_earlier.addcmul_(decay_t, d_later)
            dC[tokens] = (dy_c[:, :, None] @ states)[:, :, 0]
            dB[tokens] = ((delta_c * u_c)[:, :, None] @ d_states)[:, :, 0]
            d_input = _sum_states(torch.mul(d_states, B_c[:, :, None], out=products))
            d_exponent = decay.mul_(d_states)
            d_state[:running] = d_exponent[0]
            d_exponent[0] *= first
            d_exponent[1:] *= states[:-1]
            dA += torch.mul(d_exponent, delta_c[..., None], out=products).sum((0, 1))
            du[tokens] = d_input * delta_c
            d_delta[tokens] = _sum_states(d_exponent.mul_(A)).addcmul_(d_input, u_c)
        d_initial = torch.empty_like(d_state)
        d_initial[order] = d_state
        return du[:-1], d_delta[:-1], dA, dB[:-1], dC[:-1], d_initial, None


def _with_zeros(x: Tensor) -> Tensor:
    return pad(x, (0, 0, 0, 1))


def _memory(count: int, lengths: list[int], A: Tensor) -> Tensor:
    """Memory for that many ``(chunk, texts, E, N)`` tensors of any chunk."""
    return A.new_empty(count, min(CHUNK, max(lengths, default=0)) * len(lengths), *A.shape)


def _shaped(memory: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    """The tensors of the chunk of these ``(chunk, texts)`` tokens."""
    return memory[:, : tokens.numel()].view(-1, *tokens.shape, *memory.shape[2:]).unbind()


def _chunks(lengths: list[int], order: list[int], device: torch.device) -> Iterator[Tensor]:
    """For each chunk of time the ``(chunk, texts)`` tokens of the texts still running; T where one of them is over."""
    sizes = torch.tensor(lengths, device=device)
    starts = (sizes.cumsum(0) - sizes)[order]
    sizes = sizes[order]
    for begin in range(0, max(lengths, default=0), CHUNK):
        running = sum(length > begin for length in lengths)
        steps = torch.arange(begin, min(begin + CHUNK, max(lengths)), device=device)[:, None]
        yield torch.where(steps < sizes[:running], starts[:running] + steps, sum(lengths))


def _fill_states(states: Tensor, decay: Tensor, first: Tensor, u: Tensor, delta: Tensor, B: Tensor, A: Tensor) -> None:
    """The states after each step of a chunk, and the decays between them, both ``(chunk, texts, E, N)``."""
    torch.mul(delta[..., None], A, out=decay).exp_()
    torch.mul((delta * u)[..., None], B[:, :, None], out=states)
    previous = first
    for state, decay_t in zip(states.unbind(), decay.unbind(), strict=True):
        previous = state.addcmul_(decay_t, previous)


def _sum_states(terms: Tensor) -> Tensor:
    """The sum over the last, short axis: on the CPU a product with ones takes half as long as `sum`."""
    return terms @ terms.new_ones(terms.shape[-1])
