"""The kernels of the selective scan's backward on a GPU, which `scan_triton` launches; see `scan_triton_kernels`.

The gradients need the states of a chunk, computed from its front, and the gradients of the states, computed from its
end, at the same time. `input_gradients` first computes the states in front of groups of L tokens, and holds them. It
then processes the groups from the last to the first, and holds the states of one at a time, ``(L, N, E)`` with time
first. Triton keeps time inside a thread, so that a step in time needs no communication between threads.
"""

from __future__ import annotations

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = None

from .scan_triton_kernels import SIZES, _load, _load_exponents, _load_step, _offsets, _softplus, jit, tuned

GRADIENT_SIZES = (
    {"STATES": 512, "HELD": 2, "num_warps": 16},
    {"STATES": 256, "HELD": 4, "num_warps": 8, "maxnreg": 168},
)
"""For `input_gradients`: a thread holds one state per token, and 128 or 168 registers."""


@jit
def _row(tile: tl.tensor, t: tl.constexpr) -> tl.tensor:
    """Select row t of ``(L, N, E)``, which compiles to a selection of registers."""
    is_row = tl.arange(0, tile.shape[0])[:, None, None] == t
    # Compilers remove the addition of -0.0, but not that of 0.0, which changes -0.0 to 0.0.
    return tl.sum(tl.where(is_row, tile, -0.0), 0, keep_dims=True)


@jit
def _states(front: tl.tensor, decay: tl.tensor, added: tl.tensor) -> tuple[tl.tensor, ...]:
    """Compute the states s_t = a_t s_{t-1} + b_t, where a are the decays and b the added terms, and the last one."""
    L: tl.constexpr = decay.shape[0]
    t = tl.arange(0, L)[:, None, None]
    state = front
    states = added
    for i in tl.static_range(L):
        state = _row(decay, i) * state + _row(added, i)
        states = tl.where(t == i, state, states)
    return states, state


@jit
def _advance(
    state: tl.tensor,
    u: tl.tensor,
    dt: tl.tensor,
    dt_bias: tl.tensor,
    A_e: tl.tensor,
    B: tl.tensor,
    row: tl.tensor,
    length: tl.tensor,
    e: tl.tensor,
    is_e: tl.tensor,
    n: tl.tensor,
    u_stride: tl.constexpr,
    dt_stride: tl.constexpr,
    B_stride: tl.constexpr,
    N: tl.constexpr,
) -> tl.tensor:
    """Compute the state after some rows; those from `length` on do not change it."""
    inside = (row < length) & is_e
    delta = _softplus(_load_step(dt, dt_bias, row * dt_stride + e, e, inside))
    delta = tl.where(inside, delta, 0.0)
    x_t = delta * _load(u + row * u_stride + e, inside)
    B_t = _load(B + row * B_stride + n[None, :], (row < length) & (n < N)[None, :])
    _, state = _states(state, tl.exp2(delta[:, None, :] * A_e), B_t[:, :, None] * x_t[:, None, :])
    return state


@jit
def _state_gradients(
    end: tl.tensor, decay: tl.tensor, arriving: tl.tensor, front: tl.tensor, states: tl.tensor
) -> tuple[tl.tensor, ...]:
    """Compute the gradients of the states, of the exponents, and of the state in front.

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
    return d_states, d_exponents, gradient


@tuned(*SIZES)
@jit
def front_gradients(
    dt: tl.tensor,
    A: tl.tensor,
    C: tl.tensor,
    z: tl.tensor,
    dt_bias: tl.tensor,
    dy: tl.tensor,
    starts: tl.tensor,
    needed: tl.tensor,
    fronts: tl.tensor,
    times: tl.tensor,
    dt_stride: tl.constexpr,
    C_stride: tl.constexpr,
    z_stride: tl.constexpr,
    dy_stride: tl.constexpr,
    E: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STATES: tl.constexpr,
    CARD: tl.constexpr,
) -> None:
    """Compute what y of each chunk in `needed` adds to the gradient of the state in front, and sums of time steps."""
    chunk = tl.load(needed + tl.program_id(0)).to(tl.int64)
    first, last = tl.load(starts + chunk), tl.load(starts + chunk + 1).to(tl.int64)
    BLOCK_E: tl.constexpr = STATES // BLOCK_N if STATES > BLOCK_N else 1
    e, n, is_e, is_n, is_ne, offset = _offsets(E, N, BLOCK_N, BLOCK_E)
    A_e = _load_exponents(A, n, e, N, is_ne)
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


@tuned(*GRADIENT_SIZES)
@jit
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
    u_stride: tl.constexpr,
    dt_stride: tl.constexpr,
    B_stride: tl.constexpr,
    C_stride: tl.constexpr,
    z_stride: tl.constexpr,
    dy_stride: tl.constexpr,
    E: tl.constexpr,
    N: tl.constexpr,
    L: tl.constexpr,
    GROUPS: tl.constexpr,
    HELD: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STATES: tl.constexpr,
    CARD: tl.constexpr,
) -> None:
    """Compute all gradients from the states in front of the chunks and the gradients of the states at their ends.

    A chunk has up to GROUPS groups of L tokens. A program sums dB and dC over its channels: ``(T, programs, N)``. dA,
    dD and ddt_bias are computed for each chunk; those that are None are not wanted.
    """
    chunk = tl.program_id(0).to(tl.int64)
    first, last = tl.load(starts + chunk).to(tl.int64), tl.load(starts + chunk + 1)
    BLOCK_E: tl.constexpr = STATES // BLOCK_N if STATES > BLOCK_N else 1
    n = tl.arange(0, BLOCK_N)
    t = tl.arange(0, L)[:, None]
    number = tl.arange(0, GROUPS // HELD)[:, None, None]
    every = tl.arange(0, GROUPS)[:, None, None]
    length = (last - first).to(tl.int32)
    groups = (length + L - 1) // L
    # Offsets within a chunk have 32 bits, and need half the registers.
    u += first * u_stride
    dt += first * dt_stride
    B += first * B_stride
    C += first * C_stride
    dy += first * dy_stride
    du += first * E
    ddt += first * E
    if z is not None:
        z += first * z_stride
        dz += first * E
    fronts += chunk * N * E
    end_gradients += chunk * N * E
    dB += first * tl.num_programs(1) * N
    dC += first * tl.num_programs(1) * N
    dB_t = tl.zeros((GROUPS, L, BLOCK_N), tl.float32)
    dC_t = tl.zeros((GROUPS, L, BLOCK_N), tl.float32)

    end = tl.minimum((tl.program_id(1) + 1) * CHANNELS, E)
    for begin in range(tl.program_id(1) * CHANNELS, end, BLOCK_E):
        e = begin + tl.arange(0, BLOCK_E)[None, :]
        is_e = e < end
        is_ne = (n < N)[:, None] & is_e
        offset = n[:, None] * E + e
        A_e = (_load(A + e * N + n[:, None], is_ne) * 1.4426950408889634)[None, :, :]

        state = _load(fronts + offset, is_ne)[None, :, :]
        group_fronts = tl.zeros((GROUPS // HELD, BLOCK_N, BLOCK_E), tl.float32)
        for group in range(groups):
            group_fronts = tl.where(number * HELD == group, state, group_fronts)
            state = _advance(
                state, u, dt, dt_bias, A_e, B, group * L + t, length, e, is_e, n, u_stride, dt_stride, B_stride, N
            )

        gradient = _load(end_gradients + offset, is_ne)[None, :, :]
        dA_e = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
        dD_e = tl.zeros((1, BLOCK_E), tl.float32)
        d_bias = tl.zeros((1, BLOCK_E), tl.float32)
        for passed in range(groups):
            group = groups - 1 - passed
            row = group * L + t
            inside = (row < length) & is_e
            projected = (row < length) & (n < N)[None, :]
            B_t = _load(B + row * B_stride + n[None, :], projected)[:, :, None]
            C_t = _load(C + row * C_stride + n[None, :], projected)[:, :, None]
            u_t = _load(u + row * u_stride + e, inside)
            step = _load_step(dt, dt_bias, row * dt_stride + e, e, inside)
            delta = tl.where(inside, _softplus(step), 0.0)
            dy_t = _load(dy + row * dy_stride + e, inside)
            d_sum = dy_t
            if z is not None:
                z_t = _load(z + row * z_stride + e, inside)
                gate = tl.sigmoid(z_t)
                d_sum = dy_t * z_t * gate
            x_t = (delta * u_t)[:, None, :]
            time = delta[:, None, :]
            d_out = d_sum[:, None, :]
            decay = tl.exp2(time * A_e)

            front = tl.sum(tl.where(number == group // HELD, group_fronts, -0.0), 0, keep_dims=True)
            for before in range(group // HELD * HELD, group):
                front = _advance(
                    front, u, dt, dt_bias, A_e, B, before * L + t, length, e, is_e, n, u_stride, dt_stride, B_stride, N
                )
            states, _ = _states(front, decay, B_t * x_t)
            dC_t += tl.where(every == group, tl.sum(states * d_out, 2)[None, :, :], 0.0)
            if z is not None:
                y_t = tl.sum(states * C_t, 1)
                if D is not None:
                    y_t += _load(D + e, is_e) * u_t
                tl.store(dz + row * E + e, dy_t * y_t * gate * (1.0 + z_t * (1.0 - gate)), mask=inside)

            d_states, d_exponents, gradient = _state_gradients(gradient, decay, C_t * d_out, front, states)
            dB_t += tl.where(every == group, tl.sum(d_states * x_t, 2)[None, :, :], 0.0)
            dx = tl.sum(d_states * B_t, 1)
            d_delta = tl.sum(d_exponents * A_e, 1) * 0.6931471805599453 + dx * u_t  # log(2), since A_e includes log2(e)
            d_step = tl.where(inside, d_delta * tl.sigmoid(step), 0.0)
            tl.store(ddt + row * E + e, d_step, mask=inside)
            du_t = dx * delta
            if D is not None:
                du_t += _load(D + e, is_e) * d_sum
            tl.store(du + row * E + e, du_t, mask=inside)
            if dA is not None:
                dA_e += tl.sum(d_exponents * time, 0)
            if dD is not None:
                dD_e += tl.sum(d_sum * u_t, 0, keep_dims=True)
            if ddt_bias is not None:
                d_bias += tl.sum(d_step, 0, keep_dims=True)

        if dA is not None:
            tl.store(dA + chunk * N * E + offset, dA_e, mask=is_ne)
        if dD is not None:
            tl.store(dD + chunk * E + e, dD_e, mask=is_e)
        if ddt_bias is not None:
            tl.store(ddt_bias + chunk * E + e, d_bias, mask=is_e)

    row = every * L + t[None, :, :]
    inside = (row < length) & (n < N)[None, None, :]
    at = (row * tl.num_programs(1) + tl.program_id(1)) * N + n[None, None, :]
    tl.store(dB + at, dB_t, mask=inside)
    tl.store(dC + at, dC_t, mask=inside)


@jit
def sum_projections(
    B_sums: tl.tensor,
    C_sums: tl.tensor,
    dB: tl.tensor,
    dC: tl.tensor,
    T: tl.tensor,
    PROGRAMS: tl.tensor,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Sum dB and dC of `input_gradients` over its programs, for BLOCK tokens."""
    t = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[:, None]
    n = tl.arange(0, BLOCK_N)[None, :]
    inside = (t < T) & (n < N)
    dB_t = tl.zeros((BLOCK, BLOCK_N), tl.float32)
    dC_t = tl.zeros((BLOCK, BLOCK_N), tl.float32)
    for program in range(PROGRAMS):
        at = (t * PROGRAMS + program) * N + n
        dB_t += _load(B_sums + at, inside)
        dC_t += _load(C_sums + at, inside)
    tl.store(dB + t * N + n, dB_t, mask=inside)
    tl.store(dC + t * N + n, dC_t, mask=inside)


@jit
def sum_chunks(
    A_sums: tl.tensor,
    D_sums: tl.tensor,
    bias_sums: tl.tensor,
    dA: tl.tensor,
    dD: tl.tensor,
    ddt_bias: tl.tensor,
    CHUNKS: tl.tensor,
    E: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """Sum those gradients of `input_gradients` that it computes for each chunk."""
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)[:, None]
    inside = (n < N) & (e < E)[None, :]
    dA_e = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    dD_e = tl.zeros((BLOCK_E,), tl.float32)
    d_bias = tl.zeros((BLOCK_E,), tl.float32)
    for _ in range(CHUNKS):
        if dA is not None:
            dA_e += _load(A_sums + n * E + e[None, :], inside)
            A_sums += N * E
        if dD is not None:
            dD_e += _load(D_sums + e, e < E)
            D_sums += E
        if ddt_bias is not None:
            d_bias += _load(bias_sums + e, e < E)
            bias_sums += E
    if dA is not None:
        tl.store(dA + e[None, :] * N + n, dA_e, mask=inside)
    if dD is not None:
        tl.store(dD + e, dD_e, mask=e < E)
    if ddt_bias is not None:
        tl.store(ddt_bias + e, d_bias, mask=e < E)
