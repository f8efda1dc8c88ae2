"""The recurrence of the selective scan in plain torch, for all texts in parallel and in chunks of time.

Glossary: T tokens, S texts, E channels, N size of a channel's state; u input, delta time step.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from .autocast import outside_autocast

CHUNK = 16
"""The number of steps between two states that are saved for the backward, which recomputes those between."""


def chunked_recurrence(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, lengths: list[int]
) -> tuple[Tensor, Tensor]:
    """Scan all texts in parallel, chunk by chunk; only the states between chunks are saved for the backward.

    Args:
        u: ``(T, E)``.
        delta: Time steps ``(T, E)``.
        A: ``(E, N)``.
        B: ``(T, N)``.
        C: ``(T, N)``.
        state: Initial states ``(S, E, N)``.
        lengths: The number of tokens of each text.

    Returns:
        ``(T, E)``, and the final states ``(S, E, N)``.
    """
    if all(length == 1 for length in lengths):
        # A step of generation needs no chunks, and nothing that is computed on the CPU.
        final = torch.addcmul((delta * u)[..., None] * B[:, None], (delta[..., None] * A).exp(), state)
        return (C[:, None] @ final.mT)[:, 0], final
    y, final = _ChunkedScan.apply(u, delta, A, B, C, state, lengths)
    return y, final


class _ChunkedScan(torch.autograd.Function):
    """The scan with texts sorted by length, so that the unfinished texts are always the first ones.

    Within a chunk every tensor has a time axis in front: ``(chunk, texts, E, N)`` for states and decays. A text that
    ends inside a chunk continues with a row of zeros that follows all tokens, since a time step of zero does not change
    its state. Memory is allocated once and reused by every chunk, because allocating takes longer than the arithmetic.
    """

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor, lengths: list[int]
    ) -> tuple[Tensor, Tensor]:
        order = sorted(range(len(lengths)), key=lambda text: -lengths[text])
        u, delta, B, C = (_with_zeros(x) for x in (u, delta, B, C))
        y = torch.empty_like(u)
        state = initial[order]
        chunk_states = []
        memory = _memory(2, lengths, A)
        for tokens in _chunks(lengths, order, u.device):
            running = tokens.shape[1]
            chunk_states.append(state[:running].clone())
            states, decay = _shaped(memory, tokens)
            _fill_states(states, decay, chunk_states[-1], u[tokens], delta[tokens], B[tokens], A)
            y[tokens] = (C[tokens][:, :, None] @ states.mT)[:, :, 0]
            state[:running] = states[-1]

        final = torch.empty_like(state)
        final[order] = state
        ctx.save_for_backward(u, delta, A, B, C, *chunk_states)
        ctx.texts = lengths, order
        return y[:-1], final

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, dy: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, *chunk_states = ctx.saved_tensors
        lengths, order = ctx.texts
        dy = _with_zeros(dy)
        du, d_delta, dB, dC = (torch.empty_like(x) for x in (u, delta, B, C))
        dA = torch.zeros_like(A)
        d_state = d_final[order]
        memory = _memory(4, lengths, A)
        chunks = list(_chunks(lengths, order, u.device))

        for tokens, first in zip(reversed(chunks), reversed(chunk_states), strict=True):
            running = tokens.shape[1]
            states, decay, d_states, products = _shaped(memory, tokens)
            u_c, delta_c, B_c, dy_c = u[tokens], delta[tokens], B[tokens], dy[tokens]
            _fill_states(states, decay, first, u_c, delta_c, B_c, A)

            # The gradient of a state comes from y and from the next state, so the last step comes first.
            torch.mul(dy_c[..., None], C[tokens][:, :, None], out=d_states)
            d_states[-1] += d_state[:running]
            steps = list(zip(d_states.unbind(), decay.unbind(), strict=True))
            for (d_later, decay_t), (d_earlier, _) in pairwise(reversed(steps)):
                d_earlier.addcmul_(decay_t, d_later)

            dC[tokens] = (dy_c[:, :, None] @ states)[:, :, 0]
            dB[tokens] = ((delta_c * u_c)[:, :, None] @ d_states)[:, :, 0]
            d_input = (B_c[:, :, None] @ d_states.mT)[:, :, 0]

            # The decays are not needed any more, so that their memory can hold the gradients of the exponents.
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
    """Allocate memory for ``count`` tensors ``(chunk, texts, E, N)`` of the largest chunk."""
    return A.new_empty(count, min(CHUNK, max(lengths, default=0)) * len(lengths), *A.shape)


def _shaped(memory: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    """Return the memory as tensors for a chunk of ``(chunk, texts)`` tokens."""
    return memory[:, : tokens.numel()].view(-1, *tokens.shape, *memory.shape[2:]).unbind()


def _chunks(lengths: list[int], order: list[int], device: torch.device) -> Iterator[Tensor]:
    """Yield for each chunk of time the ``(chunk, texts)`` tokens of the unfinished texts; T after the end of a text."""
    sizes = torch.tensor(lengths, device=device)
    starts = (sizes.cumsum(0) - sizes)[order]
    sizes = sizes[order]
    for begin in range(0, max(lengths, default=0), CHUNK):
        running = sum(length > begin for length in lengths)
        steps = torch.arange(begin, min(begin + CHUNK, max(lengths)), device=device)[:, None]
        yield torch.where(steps < sizes[:running], starts[:running] + steps, sum(lengths))


def _fill_states(states: Tensor, decay: Tensor, first: Tensor, u: Tensor, delta: Tensor, B: Tensor, A: Tensor) -> None:
    """Compute the states after each step of a chunk, and the decays between them, both ``(chunk, texts, E, N)``."""
    torch.mul(delta[..., None], A, out=decay).exp_()
    torch.mul((delta * u)[..., None], B[:, :, None], out=states)
    previous = first
    for state, decay_t in zip(states.unbind(), decay.unbind(), strict=True):
        previous = state.addcmul_(decay_t, previous)


def _sum_states(terms: Tensor) -> Tensor:
    """Sum over the last, short axis; on the CPU, a product with ones takes half as long as `sum`."""
    return terms @ terms.new_ones(terms.shape[-1])
