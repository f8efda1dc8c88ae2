"""The kernels of the selective scan on a GPU, which `scan_triton` launches. Each program is one warp.

    s_t = exp(delta_t A) * s_{t-1} + x_t B_t^T        y_t = (s_t C_t + D * u_t) * silu(z_t)

A program processes one chunk of one text, and some channels. Most kernels hold a state, ``(N, E)``, and loop over time.
The last kernel, which computes the gradients, needs the states of a chunk, computed from its front, and their
gradients, computed from its end, at the same time. It holds both as ``(L, N, E)`` tiles with time first. Triton places
neighboring channels on neighboring threads, then N, and keeps time inside a thread, so that a step in time needs no
communication between threads.

The arguments are pointers and, by name, row strides and sizes. `starts` contains the first row of each chunk, followed
by T. Values of chunks have the layout ``(chunks, N, E)`` or ``(chunks, E)``. A has the layout ``(N, E)`` and is
multiplied by log2(e), for exp2.

Glossary: T tokens, L tokens of a chunk, E channels, N size of a channel's state; e, n, t indices of channels,
states and tokens; u input, dt time step before softplus, delta time step after it, z gate, x = delta * u.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = None


def _jit(kernel: Callable[..., Any]) -> Any:
    """Apply `triton.jit`; without Triton, return the function unchanged, since nothing calls it."""
    return kernel if triton is None else triton.jit(kernel)


@_jit
def _load(pointer: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Load values in float32, with zeros where the mask is False."""
    return tl.load(pointer, mask=inside, other=0.0).to(tl.float32)


@_jit
def _softplus(x: tl.tensor) -> tl.tensor:
    """Compute log(1 + exp(x)) to full precision: log(1 + r) is 2 artanh(r / (2 + r)), of which this is the series."""
    # exp(-|x|) cannot overflow; a plain log(1 + r) would lose a small r to rounding.
    r = tl.exp(-tl.abs(x))
    q = r / (r + 2.0)
    s = q * q
    series = 1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s * (1 / 11 + s * (1 / 13 + s * (1 / 15))))))
    return tl.maximum(x, 0.0) + 2.0 * (q + q * s * series)


@_jit
def _load_step(dt: tl.tensor, dt_bias: tl.tensor, at: tl.tensor, e: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Load time steps before softplus, with their bias."""
    step = _load(dt + at, inside)
    if dt_bias is not None:
        step += _load(dt_bias + e, inside)
    return step


@_jit
def _offsets(E: tl.tensor, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr) -> tuple[tl.tensor, ...]:
    """Return the channels and states of the program, the masks of those that exist, and offsets into ``(N, E)``."""
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    return e, n, e < E, n < N, (n < N)[:, None] & (e < E)[None, :], n[:, None] * E + e[None, :]


@_jit
def _row(tile: tl.tensor, t: tl.constexpr) -> tl.tensor:
    """Select row t of ``(L, N, E)``, which compiles to a selection of registers."""
    is_row = tl.arange(0, tile.shape[0])[:, None, None] == t
    # Compilers remove the addition of -0.0, but not that of 0.0, which changes -0.0 to 0.0.
    return tl.sum(tl.where(is_row, tile, -0.0), 0, keep_dims=True)


@_jit
def _states(front: tl.tensor, decay: tl.tensor, added: tl.tensor) -> tl.tensor:
    """Compute the states s_t = a_t s_{t-1} + b_t, where a are the decays and b the added terms."""
    L: tl.constexpr = decay.shape[0]
    t = tl.arange(0, L)[:, None, None]
    state = front
    states = added
    for i in tl.static_range(L):
        state = _row(decay, i) * state + _row(added, i)
        states = tl.where(t == i, state, states)
    return states


@_jit
def _state_gradients(
    end: tl.tensor, decay: tl.tensor, arriving: tl.tensor, front: tl.tensor, states: tl.tensor
) -> tuple[tl.tensor, ...]:
    """Compute the gradients of the states and of the exponents.

    Those of the states are d_t = c_t + a_{t+1} d_{t+1}, where c_t arrives from y_t. Those of the exponents are
    d_t a_t s_{t-1}.
    """
    L: tl.constexpr = decay.shape[0]
    t = tl.arange(0, L)[:, None, None]
    gradient = end
    d_states, d_exponents = arriving, arriving
    for i in tl.static_range(L - 1, -1, -1):
        gradient += _row(arriving, i)
        d_states = tl.where(t == i, gradient, d_states)
        gradient *= _row(decay, i)
        d_exponents = tl.where(t == i, gradient * (front if i == 0 else _row(states, i - 1)), d_exponents)
    return d_states, d_exponents


@_jit
def chunk_ends(
    u: tl.tensor,
    dt: tl.tensor,
    A: tl.tensor,
    B: tl.tensor,
    dt_bias: tl.tensor,
    starts: tl.tensor,
    ends: tl.tensor,
    times: tl.tensor,
    u_stride: tl.tensor,
    dt_stride: tl.tensor,
    B_stride: tl.tensor,
    E: tl.tensor,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """Compute the state at the end of each chunk if it started from zeros, and the sum of its time steps."""
    chunk = tl.program_id(0).to(tl.int64)
    first, last = tl.load(starts + chunk).to(tl.int64), tl.load(starts + chunk + 1)
    e, n, is_e, is_n, is_ne, offset = _offsets(E, N, BLOCK_N, BLOCK_E)
    A_e = _load(A + offset, is_ne)
    state = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    time = tl.zeros((BLOCK_E,), tl.float32)

    for t in range(last - first):
        row = first + t
        delta = _softplus(_load_step(dt, dt_bias, row * dt_stride + e, e, is_e))
        x = delta * _load(u + row * u_stride + e, is_e)
        B_t = _load(B + row * B_stride + n, is_n)
        state = tl.exp2(delta[None, :] * A_e) * state + B_t[:, None] * x[None, :]
        time += delta

    # The sum of the time steps gives the decay of the whole chunk, exp(A * time), from E instead of N * E numbers.
    tl.store(times + chunk * E + e, time, mask=is_e)
    tl.store(ends + chunk * N * E + offset, state, mask=is_ne)


@_jit
def carry(
    A: tl.tensor,
    initial: tl.tensor,
    chunks: tl.tensor,
    added: tl.tensor,
    times: tl.tensor,
    carried: tl.tensor,
    final: tl.tensor,
    initial_stride: tl.tensor,
    E: tl.tensor,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BACKWARDS: tl.constexpr,
) -> None:
    """Compute the states in front of the chunks of a text, or BACKWARDS the gradients of the states at their ends.

    Both follow from what each chunk adds. `chunks` contains the first chunk of each text, followed by their number.
    """
    text = tl.program_id(0).to(tl.int64)  # offsets into large tensors exceed 32 bits
    n = tl.program_id(2)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    first = tl.load(chunks + text).to(tl.int64)
    count = tl.load(chunks + text + 1) - first
    A_e = _load(A + n * E + e, e < E)
    state = tl.zeros((BLOCK_E,), tl.float32)
    if initial is not None:
        state = _load(initial + text * initial_stride + e * N + n, e < E)

    i = tl.arange(0, BLOCK)[:, None]
    for begin in range(0, count, BLOCK):
        # All loads of a block of chunks come before its stores, so that no load has to wait for a store.
        states = tl.zeros((BLOCK, BLOCK_E), tl.float32)
        for j in tl.static_range(BLOCK):
            chunk = first + begin + j
            if BACKWARDS:
                chunk = first + count - 1 - begin - j
            inside = e < tl.where(begin + j < count, E, 0)
            states = tl.where(i == j, state[None, :], states)
            decay = tl.exp2(A_e * _load(times + chunk * E + e, inside))
            state = decay * state + _load(added + (chunk * N + n) * E + e, inside)

        chunk = first + begin + i
        if BACKWARDS:
            chunk = first + count - 1 - begin - i
        tl.store(carried + (chunk * N + n) * E + e[None, :], states, mask=(e < E)[None, :] & (begin + i < count))
    tl.store(final + (text * E + e) * N + n, state, mask=e < E)


@_jit
def outputs(
    u: tl.tensor,
    dt: tl.tensor,
    A: tl.tensor,
    B: tl.tensor,
    C: tl.tensor,
    D: tl.tensor,
    z: tl.tensor,
    dt_bias: tl.tensor,
    starts: tl.tensor,
    fronts: tl.tensor,
    y: tl.tensor,
    u_stride: tl.tensor,
    dt_stride: tl.tensor,
    B_stride: tl.tensor,
    C_stride: tl.tensor,
    z_stride: tl.tensor,
    E: tl.tensor,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """Compute y of each chunk from the state in front of it."""
    chunk = tl.program_id(0).to(tl.int64)
    first, last = tl.load(starts + chunk).to(tl.int64), tl.load(starts + chunk + 1)
    e, n, is_e, is_n, is_ne, offset = _offsets(E, N, BLOCK_N, BLOCK_E)
    A_e = _load(A + offset, is_ne)
    state = _load(fronts + chunk * N * E + offset, is_ne)

    for t in range(last - first):
        row = first + t
        delta = _softplus(_load_step(dt, dt_bias, row * dt_stride + e, e, is_e))
        u_t = _load(u + row * u_stride + e, is_e)
        B_t = _load(B + row * B_stride + n, is_n)
        C_t = _load(C + row * C_stride + n, is_n)
        state = tl.exp2(delta[None, :] * A_e) * state + B_t[:, None] * (delta * u_t)[None, :]
        y_t = tl.sum(C_t[:, None] * state, 0)
        if D is not None:
            y_t += _load(D + e, is_e) * u_t
        if z is not None:
            z_t = _load(z + row * z_stride + e, is_e)
            y_t *= z_t * tl.sigmoid(z_t)
        tl.store(y + row * E + e, y_t, mask=is_e)


@_jit
def front_gradients(
    dt: tl.tensor,
    A: tl.tensor,
    C: tl.tensor,
    z: tl.tensor,
    dt_bias: tl.tensor,
    dy: tl.tensor,
    starts: tl.tensor,
    fronts: tl.tensor,
    times: tl.tensor,
    dt_stride: tl.tensor,
    C_stride: tl.tensor,
    z_stride: tl.tensor,
    dy_stride: tl.tensor,
    E: tl.tensor,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """Compute what y of a chunk adds to the gradient of the state in front of it, and the sum of its time steps."""
    chunk = tl.program_id(0).to(tl.int64)
    first, last = tl.load(starts + chunk), tl.load(starts + chunk + 1).to(tl.int64)
    e, n, is_e, is_n, is_ne, offset = _offsets(E, N, BLOCK_N, BLOCK_E)
    A_e = _load(A + offset, is_ne)
    gradient = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    time = tl.zeros((BLOCK_E,), tl.float32)

    for t in range(last - first):
        row = last - 1 - t
        delta = _softplus(_load_step(dt, dt_bias, row * dt_stride + e, e, is_e))
        dy_t = _load(dy + row * dy_stride + e, is_e)
        if z is not None:
            z_t = _load(z + row * z_stride + e, is_e)
            dy_t *= z_t * tl.sigmoid(z_t)
        C_t = _load(C + row * C_stride + n, is_n)
        gradient = tl.exp2(delta[None, :] * A_e) * (gradient + C_t[:, None] * dy_t[None, :])
        time += delta

    tl.store(times + chunk * E + e, time, mask=is_e)
    tl.store(fronts + chunk * N * E + offset, gradient, mask=is_ne)


@_jit
def input_gradients(
    u: tl.tensor,
    dt: tl.tensor,
    A: tl.tensor,
    B: tl.tensor,
    C: tl.tensor,
    D: tl.tensor,
    z: tl.tensor,
    dt_bias: tl.tensor,
    dy: tl.tensor,
    starts: tl.tensor,
    fronts: tl.tensor,
    end_gradients: tl.tensor,
    du: tl.tensor,
    ddt: tl.tensor,
    dA: tl.tensor,
    dB: tl.tensor,
    dC: tl.tensor,
    dD: tl.tensor,
    dz: tl.tensor,
    ddt_bias: tl.tensor,
    u_stride: tl.tensor,
    dt_stride: tl.tensor,
    B_stride: tl.tensor,
    C_stride: tl.tensor,
    z_stride: tl.tensor,
    dy_stride: tl.tensor,
    E: tl.tensor,
    N: tl.constexpr,
    L: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """Compute all gradients from the states in front of the chunks and the gradients of the states at their ends.

    A program processes BLOCKS blocks of channels, one after the other, and sums dB and dC over them:
    ``(T, programs, N)``. dA, dD and ddt_bias are computed for each chunk.
    """
    chunk = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    t = tl.arange(0, L)[:, None]
    n = tl.arange(0, BLOCK_N)
    row = tl.load(starts + chunk).to(tl.int64) + t
    is_t = row < tl.load(starts + chunk + 1)
    projected = is_t & (n < N)[None, :]
    B_t = _load(B + row * B_stride + n[None, :], projected)[:, :, None]
    C_t = _load(C + row * C_stride + n[None, :], projected)[:, :, None]

    # The sums stay separate for each channel of a block until the end: summing over threads once is cheaper.
    dB_t = tl.zeros((L, BLOCK_N, BLOCK_E), tl.float32)
    dC_t = tl.zeros((L, BLOCK_N, BLOCK_E), tl.float32)
    for block in range(BLOCKS):
        e = ((group * BLOCKS + block) * BLOCK_E + tl.arange(0, BLOCK_E))[None, :]
        inside = is_t & (e < E)
        is_ne = (n < N)[:, None] & (e < E)
        offset = n[:, None] * E + e
        u_t = _load(u + row * u_stride + e, inside)
        step = _load_step(dt, dt_bias, row * dt_stride + e, e, inside)
        delta = tl.where(inside, _softplus(step), 0.0)  # steps of zero after the last token do not change the state
        dy_t = _load(dy + row * dy_stride + e, inside)
        d_sum = dy_t
        if z is not None:
            z_t = _load(z + row * z_stride + e, inside)
            gate = tl.sigmoid(z_t)
            d_sum = dy_t * z_t * gate

        A_e = _load(A + offset, is_ne)[None, :, :]
        x_t = (delta * u_t)[:, None, :]
        time = delta[:, None, :]
        d_out = d_sum[:, None, :]
        decay = tl.exp2(time * A_e)

        front = _load(fronts + chunk * N * E + offset, is_ne)[None, :, :]
        states = _states(front, decay, B_t * x_t)
        dC_t += states * d_out
        if z is not None:
            y_t = tl.sum(states * C_t, 1)
            if D is not None:
                y_t += _load(D + e, e < E) * u_t
            tl.store(dz + row * E + e, dy_t * y_t * gate * (1.0 + z_t * (1.0 - gate)), mask=inside)

        end = _load(end_gradients + chunk * N * E + offset, is_ne)[None, :, :]
        d_states, d_exponents = _state_gradients(end, decay, C_t * d_out, front, states)
        dB_t += d_states * x_t
        tl.store(dA + chunk * N * E + offset, tl.sum(d_exponents * time, 0), mask=is_ne)

        dx = tl.sum(d_states * B_t, 1)
        d_delta = tl.sum(d_exponents * A_e, 1) * 0.6931471805599453 + dx * u_t  # log(2), since A includes log2(e)
        d_step = tl.where(inside, d_delta * tl.sigmoid(step), 0.0)
        tl.store(ddt + row * E + e, d_step, mask=inside)
        du_t = dx * delta
        if dt_bias is not None:
            tl.store(ddt_bias + chunk * E + e, tl.sum(d_step, 0, keep_dims=True), mask=e < E)
        if D is not None:
            du_t += _load(D + e, e < E) * d_sum
            tl.store(dD + chunk * E + e, tl.sum(d_sum * u_t, 0, keep_dims=True), mask=e < E)
        tl.store(du + row * E + e, du_t, mask=inside)

    offset = (row * tl.num_programs(1) + group) * N + n[None, :]
    tl.store(dB + offset, tl.sum(dB_t, 2), mask=projected)
    tl.store(dC + offset, tl.sum(dC_t, 2), mask=projected)


INSTALLED = triton is not None
INTERPRETED = INSTALLED and not isinstance(outputs, triton.JITFunction)
"""Whether Triton was imported under TRITON_INTERPRET=1, so that the kernels run in Python, on any device."""
