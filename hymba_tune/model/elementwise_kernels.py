"""The kernels of norms, gates and rotations on a GPU, which `elementwise_triton` launches.

A program processes a block of BLOCK_R heads of BLOCK_W elements; a row without heads is one head. The heads of all rows
are processed alike if they share a weight. If each has its own, the second index of the program is the head, and
`shared`, the number of heads of a row that share a weight, is 1.

The arguments are pointers and, by name, strides of rows and heads, and sizes. Outputs and gradients of inputs are
contiguous. The values are computed in float32 and rounded at the same steps as in `elementwise`.
"""

from __future__ import annotations

from .triton_kernels import jit, load, tl


@jit
def _heads(
    block: tl.tensor,
    rows: tl.tensor,
    shared: tl.tensor,
    width: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Return the rows, heads and columns of a block, and the mask of the elements that exist."""
    i = block * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    row = i // shared
    column = tl.arange(0, BLOCK_W)[None, :]
    return row.to(tl.int64), i % shared + tl.program_id(1), column, (row < rows) & (column < width)


@jit
def _scale(x: tl.tensor, eps: tl.tensor, width: tl.constexpr) -> tl.tensor:
    """Return the reciprocal of the root mean square of each head."""
    return tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / width + eps)


@jit
def _rounded(x: tl.tensor, like: tl.tensor) -> tl.tensor:
    """Return the values after they were stored in the dtype of a pointer."""
    return x.to(like.dtype.element_ty).to(tl.float32)


@jit
def _turned(
    own: tl.tensor,
    other: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    at: tl.tensor,
    column: tl.tensor,
    inside: tl.tensor,
    direction: tl.constexpr,
    width: tl.constexpr,
) -> tl.tensor:
    """Rotate features, given their partners, which are half a width away, and the offsets into the tables."""
    sign = tl.where(column < width // 2, -direction, direction)
    return own * load(cos + at + column, inside) + other * (sign * load(sin + at + column, inside))


@jit
def norm(
    x: tl.tensor,
    update: tl.tensor,
    weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    total: tl.tensor,
    y: tl.tensor,
    x_row: tl.tensor,
    x_head: tl.tensor,
    update_row: tl.tensor,
    table_row: tl.tensor,
    rows: tl.tensor,
    heads: tl.tensor,
    shared: tl.tensor,
    eps: tl.tensor,
    width: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
) -> None:
    """Compute the norm of x, or of its sum with an update, and rotate it if there are tables."""
    row, head, column, inside = _heads(tl.program_id(0), rows, shared, width, BLOCK_R, BLOCK_W)
    at = row * x_row + head * x_head
    value = load(x + at + column, inside)
    if update is not None:
        value = _rounded(value + load(update + row * update_row + column, inside), total)
        tl.store(total + row * width + column, value, mask=inside)
    scale = _scale(value, eps, width)
    weights = weight + tl.program_id(1) * width
    normed = _rounded(value * scale, x) if update is None else _rounded(value * scale, total)
    result = normed * load(weights + column, column < width)

    if cos is not None:
        partner = (column + width // 2) % width
        other = _rounded(load(x + at + partner, inside) * scale, x) * load(weights + partner, column < width)
        own, other = _rounded(result, y), _rounded(other, y)
        result = _turned(own, other, cos, sin, row * table_row, column, inside, 1, width)
    tl.store(y + (row * heads + head) * width + column, result, mask=inside)


@jit
def _norm_gradients(
    x: tl.tensor, weight: tl.tensor, dy: tl.tensor, eps: tl.tensor, width: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """Return the gradient of x, and that of the weight for each head."""
    scale = _scale(x, eps, width)
    normed = x * scale
    products = dy * normed
    inner = tl.sum(products * weight, 1, keep_dims=True) / width
    return (dy * weight - normed * inner) * scale, products


@jit
def norm_backward(
    x: tl.tensor,
    weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    dy: tl.tensor,
    d_total: tl.tensor,
    dx: tl.tensor,
    d_update: tl.tensor,
    parts: tl.tensor,
    x_row: tl.tensor,
    x_head: tl.tensor,
    dy_row: tl.tensor,
    dy_head: tl.tensor,
    d_total_row: tl.tensor,
    table_row: tl.tensor,
    rows: tl.tensor,
    heads: tl.tensor,
    shared: tl.tensor,
    eps: tl.tensor,
    width: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
) -> None:
    """Compute the gradients of `norm`, given its input or the sum, and the gradient of the sum if it has one.

    Each program writes its own sum of the gradients of the weight: ``(programs, heads or 1, width)``.
    """
    column = tl.arange(0, BLOCK_W)[None, :]
    weights = load(weight + tl.program_id(1) * width + column, column < width)
    sums = tl.zeros((BLOCK_R, BLOCK_W), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows * shared, BLOCK_R), tl.num_programs(0)):
        row, head, column, inside = _heads(block, rows, shared, width, BLOCK_R, BLOCK_W)
        at = row * dy_row + head * dy_head
        gradient = load(dy + at + column, inside)
        if cos is not None:
            partner = load(dy + at + (column + width // 2) % width, inside)
            gradient = _turned(gradient, partner, cos, sin, row * table_row, column, inside, -1, width)

        value = load(x + row * x_row + head * x_head + column, inside)
        gradient, products = _norm_gradients(value, weights, gradient, eps, width)
        if parts is not None:
            sums += products
        if d_total is not None:
            gradient += load(d_total + row * d_total_row + column, inside)
        out = (row * heads + head) * width + column
        if dx is not None:
            tl.store(dx + out, gradient, mask=inside)
        if d_update is not None:
            tl.store(d_update + out, gradient, mask=inside)

    if parts is not None:
        out = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * width + column
        tl.store(parts + out, tl.sum(sums, 0, keep_dims=True), mask=column < width)


@jit
def mean_of_norms(
    a: tl.tensor,
    a_weight: tl.tensor,
    b: tl.tensor,
    b_weight: tl.tensor,
    y: tl.tensor,
    a_row: tl.tensor,
    b_row: tl.tensor,
    rows: tl.tensor,
    eps: tl.tensor,
    width: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
) -> None:
    """Compute the mean of two norms."""
    row, _, column, inside = _heads(tl.program_id(0), rows, 1, width, BLOCK_R, BLOCK_W)
    a_value = load(a + row * a_row + column, inside)
    b_value = load(b + row * b_row + column, inside)
    a_normed = _rounded(a_value * _scale(a_value, eps, width), a) * load(a_weight + column, column < width)
    b_normed = _rounded(b_value * _scale(b_value, eps, width), b) * load(b_weight + column, column < width)
    mean = (_rounded(a_normed, y) + _rounded(b_normed, y)) * 0.5
    tl.store(y + row * width + column, mean, mask=inside)


@jit
def mean_of_norms_backward(
    a: tl.tensor,
    a_weight: tl.tensor,
    b: tl.tensor,
    b_weight: tl.tensor,
    dy: tl.tensor,
    da: tl.tensor,
    db: tl.tensor,
    parts: tl.tensor,
    a_row: tl.tensor,
    b_row: tl.tensor,
    dy_row: tl.tensor,
    rows: tl.tensor,
    eps: tl.tensor,
    width: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
) -> None:
    """Compute the gradients of `mean_of_norms`. Each program writes its own sums for the weights: ``(2, width)``."""
    column = tl.arange(0, BLOCK_W)[None, :]
    a_weights = load(a_weight + column, column < width)
    b_weights = load(b_weight + column, column < width)
    a_sums = tl.zeros((BLOCK_R, BLOCK_W), tl.float32)
    b_sums = tl.zeros((BLOCK_R, BLOCK_W), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        row, _, column, inside = _heads(block, rows, 1, width, BLOCK_R, BLOCK_W)
        half = load(dy + row * dy_row + column, inside) * 0.5
        a_value = load(a + row * a_row + column, inside)
        gradient, products = _norm_gradients(a_value, a_weights, half, eps, width)
        tl.store(da + row * width + column, gradient, mask=inside)
        if parts is not None:
            a_sums += products
        b_value = load(b + row * b_row + column, inside)
        gradient, products = _norm_gradients(b_value, b_weights, half, eps, width)
        tl.store(db + row * width + column, gradient, mask=inside)
        if parts is not None:
            b_sums += products

    if parts is not None:
        out = tl.program_id(0) * 2 * width + column
        tl.store(parts + out, tl.sum(a_sums, 0, keep_dims=True), mask=column < width)
        tl.store(parts + out + width, tl.sum(b_sums, 0, keep_dims=True), mask=column < width)


@jit
def gated_silu(
    gate: tl.tensor,
    up: tl.tensor,
    y: tl.tensor,
    gate_row: tl.tensor,
    up_row: tl.tensor,
    width: tl.tensor,
    BLOCK_W: tl.constexpr,
) -> None:
    """Compute silu(gate) * up for some columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = column < width
    value = load(gate + row * gate_row + column, inside)
    gated = _rounded(value * tl.sigmoid(value), gate) * load(up + row * up_row + column, inside)
    tl.store(y + row * width + column, gated, mask=inside)


@jit
def gated_silu_backward(
    gate: tl.tensor,
    up: tl.tensor,
    dy: tl.tensor,
    d_gate: tl.tensor,
    d_up: tl.tensor,
    gate_row: tl.tensor,
    up_row: tl.tensor,
    dy_row: tl.tensor,
    width: tl.tensor,
    BLOCK_W: tl.constexpr,
) -> None:
    """Compute the gradients of `gated_silu`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = column < width
    value = load(gate + row * gate_row + column, inside)
    gradient = load(dy + row * dy_row + column, inside)
    factor = tl.sigmoid(value)
    d_silu = gradient * load(up + row * up_row + column, inside)
    tl.store(d_gate + row * width + column, d_silu * factor * (1.0 + value * (1.0 - factor)), mask=inside)
    tl.store(d_up + row * width + column, gradient * value * factor, mask=inside)


@jit
def rotate(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    y: tl.tensor,
    x_row: tl.tensor,
    x_head: tl.tensor,
    table_row: tl.tensor,
    rows: tl.tensor,
    heads: tl.tensor,
    shared: tl.tensor,
    direction: tl.constexpr,
    width: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
) -> None:
    """Rotate the heads in a direction, 1 or -1."""
    row, head, column, inside = _heads(tl.program_id(0), rows, shared, width, BLOCK_R, BLOCK_W)
    at = row * x_row + head * x_head
    own, other = load(x + at + column, inside), load(x + at + (column + width // 2) % width, inside)
    turned = _turned(own, other, cos, sin, row * table_row, column, inside, direction, width)
    tl.store(y + (row * heads + head) * width + column, turned, mask=inside)
