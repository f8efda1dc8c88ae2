"""The kernels of the selective scan on a GPU, which `scan_triton` launches. Each program is one warp.

    s_t = exp(delta_t A) * s_{t-1} + x_t B_t^T        y_t = (s_t C_t + D * u_t) * silu(z_t)

A program takes one chunk of one text, and some channels. The kernels that sweep hold a state, ``(N, E)``, and walk
along time. The last one, which gives the gradients, needs a chunk's states from its front and their gradients from its
end, side by side: it holds both as ``(L, N, E)`` tiles, time first. Triton lays neighbouring channels on neighbouring
threads, then N, and keeps time inside a thread, so that to go along time costs nothing but the arithmetic.

Arguments are pointers and, by name, strides of rows and sizes. `starts` holds the first row of each chunk and, behind
them, T; what belongs to chunks lies in memory as ``(chunks, N, E)`` or ``(chunks, E)``. A comes as ``(N, E)`` and
times log2(e), for exp2.

Glossary: T tokens, L of a chunk, E channels, N size of a channel's state; e, n, t count channels, states and tokens; u
input, dt time step before softplus, delta after, z gate, x = delta * u.
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
    """`triton.jit`; without Triton the function as it is, which nothing calls."""
    return kernel if triton is None else triton.jit(kernel)


@_jit
def _load(pointer: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """In float32, zeros outside."""
    return tl.load(pointer, mask=inside, other=0.0).to(tl.float32)


@_jit
def _softplus(x: tl.tensor) -> tl.tensor:
    """log(1 + exp(x)) to full precision: log(1 + r) is 2 artanh(r / (2 + r)), here by its series."""
    r = tl.exp(-tl.abs(x))
    q = r / (r + 2.0)
    s = q * q
    series = 1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s * (1 / 11 + s * (1 / 13 + s * (1 / 15))))))
    return tl.maximum(x, 0.0) + 2.0 * (q + q * s * series)


@_jit
def _load_step(dt: tl.tensor, dt_bias: tl.tensor, at: tl.tensor, e: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """A time step before softplus."""
    step = _load(dt + at, inside)
    if dt_bias is not None:
        step += _load(dt_bias + e, inside)
    return step


@_jit
def _places(E: tl.tensor, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr) -> tuple[tl.tensor, ...]:
    """The program's channels and states, which of them there are, and where they lie in an ``(N, E)`` matrix."""
    e, n = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_N)
    return e, n, e < E, n < N, (n < N)[:, None] & (e < E)[None, :], n[:, None] * E + e[None, :]


@_jit
def _row(tile: tl.tensor, t: tl.constexpr) -> tl.tensor:
    """Row t of ``(L, N, E)``, which compiles to a choice of registers."""
    here = tl.arange(0, tile.shape[0])[:, None, None] == t
    return tl.sum(tl.where(here, tile, -0.0), 0, keep_dims=True)  # x + -0.0 is x, as compilers know; x + 0.0 may not be


@_jit
def _states(front: tl.tensor, decay: tl.tensor, added: tl.tensor) -> tl.tensor:
    """The states s_t = a_t s_{t-1} + b_t, a the decays and b what is added."""
    L: tl.constexpr = decay.shape[0]
    t = tl.arange(0, L)[:, None, None]
    state, states = front, added
    for i in tl.static_range(L):
        state = _row(decay, i) * state + _row(added, i)
        states = tl.where(t == i, state, states)
    return states


@_jit
def _state_gradients(
    behind: tl.tensor, decay: tl.tensor, arriving: tl.tensor, front: tl.tensor, states: tl.tensor
) -> tuple[tl.tensor, ...]:
    """The states' gradients d_t = c_t + a_{t+1} d_{t+1}, c_t what arrives from y_t; the exponents' d_t a_t s_{t-1}."""
    L: tl.constexpr = decay.shape[0]
    t = tl.arange(0, L)[:, None, None]
    gradient, d_states, d_exponents = behind, arriving, arriving
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
    """The state at the end of each chunk had it begun with zeros, and the time that passes in it."""
    chunk = tl.program_id(0).to(tl.int64)
    first, last = tl.load(starts + chunk).to(tl.int64), tl.load(starts + chunk + 1)
    e, n, is_e, is_n, held, place = _places(E, N, BLOCK_N, BLOCK_E)
    A_e = _load(A + place, held)
    state = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    time = tl.zeros((BLOCK_E,), tl.float32)
    for t in range(last - first):
        row = first + t
        delta = _softplus(_load_step(dt, dt_bias, row * dt_stride + e, e, is_e))
        x = delta * _load(u + row * u_stride + e, is_e)
        B_t = _load(B + row * B_stride + n, is_n)
        state = tl.exp2(delta[None, :] * A_e) * state + B_t[:, None] * x[None, :]
        time += delta
    tl.store(times + chunk * E + e, time, mask=is_e)
    tl.store(ends + chunk * N * E + place, state, mask=held)


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
    """The states in front of a text's chunks, or BACKWARDS the gradients behind them, from what each chunk adds.

    `chunks` holds the first chunk of each text and, behind them, their number.
    """
    text, n = tl.program_id(0).to(tl.int64), tl.program_id(2)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    first = tl.load(chunks + text).to(tl.int64)
    count = tl.load(chunks + text + 1) - first
    A_e = _load(A + n * E + e, e < E)
    state = tl.zeros((BLOCK_E,), tl.float32)
    if initial is not None:
        state = _load(initial + text * initial_stride + e * N + n, e < E)
    i = tl.arange(0, BLOCK)[:, None]
    for begin in range(0, count, BLOCK):
        # What is read waits for no store: stores come after a block of chunks.
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
    """Y of each chunk, from the state in front of it."""
    chunk = tl.program_id(0).to(tl.int64)
    first, last = tl.load(starts + chunk).to(tl.int64), tl.load(starts + chunk + 1)
    e, n, is_e, is_n, held, place = _places(E, N, BLOCK_N, BLOCK_E)
    A_e = _load(A + place, held)
    state = _load(fronts + chunk * N * E + place, held)
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
    """What the chunk's own y add to the gradient of the state in front of it, and the time that passes in it."""
    chunk = tl.program_id(0).to(tl.int64)
    first, last = tl.load(starts + chunk), tl.load(starts + chunk + 1).to(tl.int64)
    e, n, is_e, is_n, held, place = _places(E, N, BLOCK_N, BLOCK_E)
    A_e = _load(A + place, held)
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
    tl.store(fronts + chunk * N * E + place, gradient, mask=held)


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
    behind: tl.tensor,
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
    """All gradients, from the states in front of the chunks and the gradients that reach their last states.

    A program takes BLOCKS blocks of channels, one after the other, and sums dB and dC over them: ``(T, programs, N)``.
    dA, dD and ddt_bias are those of each chunk.
    """
    chunk, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t, n = tl.arange(0, L)[:, None], tl.arange(0, BLOCK_N)
    row = tl.load(starts + chunk).to(tl.int64) + t
    is_t = row < tl.load(starts + chunk + 1)
    projected = is_t & (n < N)[None, :]
    B_t = _load(B + row * B_stride + n[None, :], projected)[:, :, None]
    C_t = _load(C + row * C_stride + n[None, :], projected)[:, :, None]
    dB_t = tl.zeros((L, BLOCK_N, BLOCK_E), tl.float32)
    dC_t = tl.zeros((L, BLOCK_N, BLOCK_E), tl.float32)
    for block in range(BLOCKS):
        e = ((group * BLOCKS + block) * BLOCK_E + tl.arange(0, BLOCK_E))[None, :]
        inside, held = is_t & (e < E), (n < N)[:, None] & (e < E)
        place = n[:, None] * E + e
        u_t = _load(u + row * u_stride + e, inside)
        step = _load_step(dt, dt_bias, row * dt_stride + e, e, inside)
        delta = tl.where(inside, _softplus(step), 0.0)  # behind the last token no time passes: the state stays
        dy_t = _load(dy + row * dy_stride + e, inside)
        d_sum = dy_t
        if z is not None:
            z_t = _load(z + row * z_stride + e, inside)
            gate = tl.sigmoid(z_t)
            d_sum = dy_t * z_t * gate
        A_e = _load(A + place, held)[None, :, :]
        x_t, time, d_out = (delta * u_t)[:, None, :], delta[:, None, :], d_sum[:, None, :]
        decay = tl.exp2(time * A_e)

        front = _load(fronts + chunk * N * E + place, held)[None, :, :]
        states = _states(front, decay, B_t * x_t)
        dC_t += states * d_out
        if z is not None:
            y_t = tl.sum(states * C_t, 1)
            if D is not None:
                y_t += _load(D + e, e < E) * u_t
            tl.store(dz + row * E + e, dy_t * y_t * gate * (1.0 + z_t * (1.0 - gate)), mask=inside)

        last = _load(behind + chunk * N * E + place, held)[None, :, :]
        d_states, d_exponents = _state_gradients(last, decay, C_t * d_out, front, states)
        dB_t += d_states * x_t
        tl.store(dA + chunk * N * E + place, tl.sum(d_exponents * time, 0), mask=held)
        dx = tl.sum(d_states * B_t, 1)
        d_delta = tl.sum(d_exponents * A_e, 1) * 0.6931471805599453 + dx * u_t  # log(2): A is in units of log2(e)
        d_step = tl.where(inside, d_delta * tl.sigmoid(step), 0.0)
        tl.store(ddt + row * E + e, d_step, mask=inside)
        du_t = dx * delta
        if dt_bias is not None:
            tl.store(ddt_bias + chunk * E + e, tl.sum(d_step, 0, keep_dims=True), mask=e < E)
        if D is not None:
            du_t += _load(D + e, e < E) * d_sum
            tl.store(dD + chunk * E + e, tl.sum(d_sum * u_t, 0, keep_dims=True), mask=e < E)
        tl.store(du + row * E + e, du_t, mask=inside)
    place = (row * tl.num_programs(1) + group) * N + n[None, :]
    tl.store(dB + place, tl.sum(dB_t, 2), mask=projected)
    tl.store(dC + place, tl.sum(dC_t, 2), mask=projected)


INSTALLED = triton is not None
INTERPRETED = INSTALLED and not isinstance(outputs, triton.JITFunction)
"""Whether Triton was imported under TRITON_INTERPRET=1: the kernels then run in Python, on any device."""
