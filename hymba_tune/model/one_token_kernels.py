"""The kernels of one new token of each text on a GPU, which `one_token_triton` launches.

The values are computed in float32 and rounded at the same steps as in the other passes. Each text is computed alike,
whatever the other texts are. The arguments are pointers and, by name, strides and sizes.

The last kernel is a matrix product of a few rows, whose time is that of reading the weights.

Glossary: S texts, H query heads, G key/value heads, a width of a query or key head, v width of a value head, E channels
of the SSM, K width of the convolution, N size of a channel's state, R rank of the time steps; e, n, r indices of
channels, states and ranks.
"""

from __future__ import annotations

from .scan_triton_kernels import _softplus
from .triton_kernels import jit, load, tl


@jit
def _rounded(x: tl.tensor, like: tl.tensor) -> tl.tensor:
    """Return the values after they were stored in the dtype of a pointer."""
    return x.to(like.dtype.element_ty).to(tl.float32)


@jit
def _weighted(x: tl.tensor, weight: tl.tensor, at: tl.tensor, inside: tl.tensor, like: tl.tensor) -> tl.tensor:
    """Multiply normalized values by the weight of the norm; the result has the dtype of both if they share one."""
    result = _rounded(x, like) * load(weight + at, inside)
    return _rounded(result, like) if weight.dtype.element_ty == like.dtype.element_ty else result


@jit
def _norm(
    x: tl.tensor, weight: tl.tensor, at: tl.tensor, inside: tl.tensor, eps: tl.tensor, width: tl.constexpr
) -> tl.tensor:
    """Load a vector, which is normalized if there is a weight."""
    values = load(x + at, inside)
    if weight is None:
        return values
    return _weighted(values * tl.rsqrt(tl.sum(values * values, 0) / width + eps), weight, at, inside, x)


@jit
def _heads(
    x: tl.tensor,
    weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    eps: tl.tensor,
    head: tl.tensor,
    heads: tl.constexpr,
    width: tl.constexpr,
    weight_head: tl.constexpr,
    BLOCK_A: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Norm and rotate some heads.

    Returns:
        The heads, their columns, and the mask of the elements that exist.
    """
    column = tl.arange(0, BLOCK_A)[None, :]
    inside = (head < heads) & (column < width)
    # A feature is rotated with its partner, which is half a width away.
    partner = (column + width // 2) % width
    own = load(x + head * width + column, inside)
    other = load(x + head * width + partner, inside)
    if weight is not None:
        scale = tl.rsqrt(tl.sum(own * own, 1, keep_dims=True) / width + eps)
        own = _weighted(own * scale, weight, head * weight_head + column, inside, x)
        other = _weighted(other * scale, weight, head * weight_head + partner, inside, x)
    if cos is not None:
        sign = tl.where(column < width // 2, -1.0, 1.0)
        own = own * load(cos + column, inside) + other * (sign * load(sin + column, inside))
    return own, column, inside


@jit
def _convolution(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    tails: tl.tensor,
    tails_row: tl.tensor,
    e: tl.tensor,
    E: tl.constexpr,
    K: tl.constexpr,
) -> tl.tensor:
    """Convolve one token, which then is the last of the earlier inputs."""
    is_e = e < E
    new = load(x + e, is_e)
    y = new * load(weight + e * K + K - 1, is_e)
    if bias is not None:
        y += load(bias + e, is_e)
    for k in tl.static_range(K - 1):
        before = load(tails + k * tails_row + e, is_e)
        y += before * load(weight + e * K + k, is_e)
        # The row in front was read in the step before.
        if k > 0:
            tl.store(tails + (k - 1) * tails_row + e, before, mask=is_e)
    if K > 1:
        tl.store(tails + (K - 2) * tails_row + e, new, mask=is_e)
    return y


@jit
def prepare_token(
    projected: tl.tensor,
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    lengths: tl.tensor,
    conv_weight: tl.tensor,
    conv_bias: tl.tensor,
    tails: tl.tensor,
    query: tl.tensor,
    x: tl.tensor,
    projected_row: tl.tensor,
    table_row: tl.tensor,
    key_text: tl.tensor,
    key_group: tl.tensor,
    key_column: tl.tensor,
    value_text: tl.tensor,
    value_group: tl.tensor,
    value_column: tl.tensor,
    tails_text: tl.tensor,
    tails_row: tl.tensor,
    columns: tl.tensor,
    eps: tl.tensor,
    q_norm_head: tl.constexpr,
    k_norm_head: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    A: tl.constexpr,
    V: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """Compute `one_token.prepare`. A program processes some heads or channels of one text."""
    QUERIES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    GROUPS: tl.constexpr = (G + BLOCK_H - 1) // BLOCK_H
    text = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    row = projected + text * projected_row
    if cos is not None:
        cos += text * table_row
        sin += text * table_row

    if block < QUERIES:
        head = block * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        heads, column, inside = _heads(row, q_norm, cos, sin, eps, head, H, A, q_norm_head, BLOCK_A)
        tl.store(query + (text * H + head) * A + column, heads, mask=inside)
    elif block < QUERIES + GROUPS:
        if G > 0:
            group = (block - QUERIES) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
            heads, column, inside = _heads(row + H * A, k_norm, cos, sin, eps, group, G, A, k_norm_head, BLOCK_A)
            slot = tl.load(lengths + text) % columns
            tl.store(key + text * key_text + group * key_group + slot * key_column + column, heads, mask=inside)
    elif block < QUERIES + 2 * GROUPS:
        if G > 0:
            group = (block - QUERIES - GROUPS) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
            column = tl.arange(0, BLOCK_V)[None, :]
            inside = (group < G) & (column < V)
            values = load(row + (H + G) * A + group * V + column, inside)
            slot = tl.load(lengths + text) % columns
            tl.store(
                value + text * value_text + group * value_group + slot * value_column + column, values, mask=inside
            )
    else:
        e = (block - QUERIES - 2 * GROUPS) * BLOCK_E + tl.arange(0, BLOCK_E)
        y = _convolution(
            row + (H + G) * A + G * V, conv_weight, conv_bias, tails + text * tails_text, tails_row, e, E, K
        )
        y = _rounded(y, x)
        tl.store(x + text * E + e, y / (1.0 + tl.exp(-y)), mask=e < E)


@jit
def update_state(
    x: tl.tensor,
    parameters: tl.tensor,
    gate: tl.tensor,
    dt_norm: tl.tensor,
    B_norm: tl.tensor,
    C_norm: tl.tensor,
    dt_weight: tl.tensor,
    dt_bias: tl.tensor,
    A_log: tl.tensor,
    D: tl.tensor,
    state: tl.tensor,
    y: tl.tensor,
    x_row: tl.tensor,
    parameters_row: tl.tensor,
    gate_row: tl.tensor,
    state_text: tl.tensor,
    texts: tl.tensor,
    count: tl.tensor,
    eps: tl.tensor,
    E: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Compute `one_token.update`. A program processes some channels of ``count`` texts, and reads the weights once."""
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    r = tl.arange(0, BLOCK_R)
    n = tl.arange(0, BLOCK_N)
    is_e, is_r, is_n = e < E, r < R, n < N
    is_state = is_e[:, None] & is_n[None, :]
    at = e[:, None] * N + n[None, :]

    weight = load(dt_weight + e[:, None] * R + r[None, :], is_e[:, None] & is_r[None, :])
    A = -tl.exp(load(A_log + at, is_state)) * 1.4426950408889634
    skip = load(D + e, is_e)
    bias = tl.zeros((BLOCK_E,), tl.float32)
    if dt_bias is not None:
        bias += load(dt_bias + e, is_e)

    first = tl.program_id(1) * count
    for index in range(first, tl.minimum(first + count, texts)):
        text = tl.cast(index, tl.int64)
        # The state takes the longest to arrive, so it is asked for before the time steps are computed.
        place = state + text * state_text + at
        states = load(place, is_state)
        u = load(x + text * x_row + e, is_e)
        z = load(gate + text * gate_row + e, is_e)

        row = parameters + text * parameters_row
        step = _norm(row, dt_norm, r, is_r, eps, R)
        delta = _softplus(tl.sum(weight * step[None, :], 1) + bias)
        B = _norm(row + R, B_norm, n, is_n, eps, N)
        C = _norm(row + R + N, C_norm, n, is_n, eps, N)

        states = tl.exp2(delta[:, None] * A) * states + (delta * u)[:, None] * B[None, :]
        tl.store(place, states, mask=is_state)
        result = tl.sum(states * C[None, :], 1) + u * skip
        tl.store(y + text * E + e, result * z / (1.0 + tl.exp(-z)), mask=is_e)


@jit
def _weights(
    pointer: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    width: tl.constexpr,
    inner: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """Load a transposed block of weights ``(inner, width)``, without a mask if blocks divide both sizes."""
    at = pointer + n * width + k
    if inner % BLOCK_N == 0 and width % BLOCK_K == 0:
        return tl.load(at)
    return tl.load(at, mask=(n < inner) & (k < width), other=0.0)


@jit
def _multiply(a: tl.tensor, b: tl.tensor, total: tl.tensor, WIDE: tl.constexpr) -> tl.tensor:
    """Add a matrix product to a total; interpreted, products have no 16-bit inputs."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total)


@jit
def multiply_gate_up(
    x: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    y: tl.tensor,
    x_row: tl.tensor,
    rows: tl.tensor,
    width: tl.constexpr,
    inner: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """Compute `few_rows.gate_up` with weights ``(inner, width)``. A program computes some columns of all rows."""
    m = tl.arange(0, BLOCK_M)[:, None]
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    gates = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    ups = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, width, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        values = tl.load(x + m * x_row + k[None, :], mask=(m < rows) & (k < width)[None, :], other=0.0)
        gates = _multiply(values, _weights(gate, n, k[:, None], width, inner, BLOCK_N, BLOCK_K), gates, WIDE)
        ups = _multiply(values, _weights(up, n, k[:, None], width, inner, BLOCK_N, BLOCK_K), ups, WIDE)

    gates = _rounded(gates, y)
    result = _rounded(gates / (1.0 + tl.exp(-gates)), y) * _rounded(ups, y)
    tl.store(y + m * inner + n, result, mask=(m < rows) & (n < inner))
