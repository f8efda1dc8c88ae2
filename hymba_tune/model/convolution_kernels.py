"""The kernels of the convolution on a GPU, which `convolution_triton` launches.

A program processes BLOCK_T tokens, or strides over such blocks, and BLOCK_E channels. The rows are the meta tokens,
then the tokens of all texts. Lag k of a token is the input k tokens before it: in its own text, or else among the last
meta tokens or in the initial inputs of its text, ``(S, K - 1, E)``, or else zero.

The arguments are pointers and, by name, row strides and sizes. `ids` contains the text of each token, and `starts` the
offsets of the texts; both count from the first token after the meta tokens. With `SILU`, silu is applied to the result.

Glossary: E channels, K width of the convolution; e, t, k indices of channels, rows and lags.
"""

from __future__ import annotations

from .triton_kernels import jit, load, tl


@jit
def _text(t: tl.tensor, ids: tl.tensor, starts: tl.tensor, meta: tl.tensor, rows: tl.tensor) -> tuple[tl.tensor, ...]:
    """Return the text of each row, the number of tokens in front of it there, and the row after the text's last one."""
    text, begin, end = t * 0, t * 0, t * 0 + meta
    if ids is not None:
        is_text = (t >= meta) & (t < rows)
        text = tl.load(ids + t - meta, mask=is_text, other=0)
        begin = tl.where(is_text, tl.load(starts + text, mask=is_text, other=0) + meta, 0)
        end = tl.load(starts + text + 1, mask=is_text, other=0) + meta
    return text, t - begin, end


@jit
def _lag(
    x: tl.tensor,
    initial: tl.tensor,
    t: tl.tensor,
    past: tl.tensor,
    text: tl.tensor,
    k: tl.tensor,
    e: tl.tensor,
    inside: tl.tensor,
    meta: tl.tensor,
    x_row: tl.tensor,
    E: tl.tensor,
    K: tl.constexpr,
) -> tl.tensor:
    """Load the inputs at lag k of rows with that many tokens in front of them in their texts."""
    in_text = past >= k
    source = tl.where(in_text, t - k, meta + past - k)
    value = load(x + source * x_row + e, inside & (source >= 0) & (in_text | (t >= meta)))
    if initial is not None:
        value += load(initial + (text * (K - 1) + K - 1 + past - k) * E + e, inside & (past < k))
    return value


@jit
def _taps(weight: tl.tensor, e: tl.tensor, E: tl.tensor, K: tl.constexpr) -> tuple[tl.tensor, ...]:
    """Load the weights of the lags from 0 to K - 1."""
    taps = ()
    for k in tl.static_range(K):
        taps = taps + (load(weight + e * K + K - 1 - k, e < E),)  # type: ignore[assignment]  # noqa: RUF005
    return taps


@jit
def _bias(bias: tl.tensor, e: tl.tensor, E: tl.tensor) -> tl.tensor:
    """Load the bias, or zeros if there is none."""
    values = (e * 0).to(tl.float32)
    if bias is not None:
        values = load(bias + e, e < E)
    return values


@jit
def _sum(
    x: tl.tensor,
    taps: tl.tuple,
    bias_e: tl.tensor,
    initial: tl.tensor,
    t: tl.tensor,
    past: tl.tensor,
    text: tl.tensor,
    e: tl.tensor,
    inside: tl.tensor,
    meta: tl.tensor,
    x_row: tl.tensor,
    E: tl.tensor,
    K: tl.constexpr,
) -> tl.tensor:
    """Compute the convolution before silu."""
    total = bias_e + taps[0] * _lag(x, initial, t, past, text, 0, e, inside, meta, x_row, E, K)
    for k in tl.static_range(1, K):
        total += taps[k] * _lag(x, initial, t, past, text, k, e, inside, meta, x_row, E, K)
    return total


@jit
def _sum_gradient(
    x: tl.tensor,
    taps: tl.tuple,
    bias_e: tl.tensor,
    initial: tl.tensor,
    dy: tl.tensor,
    t: tl.tensor,
    past: tl.tensor,
    text: tl.tensor,
    e: tl.tensor,
    inside: tl.tensor,
    meta: tl.tensor,
    x_row: tl.tensor,
    dy_row: tl.tensor,
    E: tl.tensor,
    K: tl.constexpr,
    SILU: tl.constexpr,
) -> tl.tensor:
    """Compute the gradient of the convolution before silu."""
    gradient = load(dy + t * dy_row + e, inside)
    if SILU:
        total = _sum(x, taps, bias_e, initial, t, past, text, e, inside, meta, x_row, E, K)
        gate = tl.sigmoid(total)
        gradient *= gate * (1.0 + total * (1.0 - gate))
    return gradient


@jit
def convolve(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    initial: tl.tensor,
    ids: tl.tensor,
    starts: tl.tensor,
    y: tl.tensor,
    tails: tl.tensor,
    meta: tl.tensor,
    rows: tl.tensor,
    texts: tl.tensor,
    strips: tl.tensor,
    x_row: tl.tensor,
    E: tl.tensor,
    K: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """Compute the convolution in the first `strips` programs, and in the others the last K - 1 inputs of each text."""
    e = (tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E))[None, :]
    strip = tl.program_id(0)
    if strip < strips:
        taps, bias_e = _taps(weight, e, E, K), _bias(bias, e, E)
        for block in range(strip, tl.cdiv(rows, BLOCK_T), strips):
            t = (block * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]).to(tl.int64)
            inside = (t < rows) & (e < E)
            text, past, _ = _text(t, ids, starts, meta, rows)
            total = _sum(x, taps, bias_e, initial, t, past, text, e, inside, meta, x_row, E, K)
            if SILU:
                total *= tl.sigmoid(total)
            tl.store(y + t * E + e, total, mask=inside)
    elif tails is not None:
        # The last inputs are what a next token of the text would see.
        i = ((strip - strips) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]).to(tl.int64)
        inside = (i < texts * (K - 1)) & (e < E)
        text = i // (K - 1)
        begin = tl.load(starts + text, mask=text < texts, other=0)
        end = tl.load(starts + text + 1, mask=text < texts, other=0)
        lag = K - 1 - i % (K - 1)
        value = _lag(x, initial, meta + end, end - begin, text, lag, e, inside, meta, x_row, E, K)
        tl.store(tails + i * E + e, value, mask=inside)


@jit
def _meta_gradients(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    starts: tl.tensor,
    dy: tl.tensor,
    meta: tl.tensor,
    texts: tl.tensor,
    x_row: tl.tensor,
    dy_row: tl.tensor,
    e: tl.tensor,
    E: tl.tensor,
    K: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """Compute the gradients of the last K - 1 meta tokens; row i is that of the token i rows before the first text."""
    taps, bias_e = _taps(weight, e, E, K), _bias(bias, e, E)
    i = tl.arange(0, BLOCK_K)[:, None]
    gradients = tl.zeros((BLOCK_K, e.shape[1]), tl.float32)
    for block in range(tl.cdiv(texts, BLOCK_T)):
        text = block * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
        begin = tl.load(starts + text, mask=text < texts, other=0)
        length = tl.load(starts + text + 1, mask=text < texts, other=0) - begin
        for past in tl.static_range(K - 1):
            seen = (past < length) & (e < E)
            t = meta + begin + past
            d_sum = _sum_gradient(x, taps, bias_e, None, dy, t, past, text, e, seen, meta, x_row, dy_row, E, K, SILU)
            lag = past + i
            weights = load(weight + e * K + K - 1 - lag, (e < E) & (i > 0) & (lag < K))
            gradients += tl.sum(d_sum, 0, keep_dims=True) * weights

    # The last meta tokens see each other as well.
    row = meta - i.to(tl.int64)
    for k in tl.static_range(K - 1):
        seen = (row >= 0) & (row + k < meta) & (i < K) & (e < E)
        t = row + k
        d_sum = _sum_gradient(x, taps, bias_e, None, dy, t, t, 0, e, seen, meta, x_row, dy_row, E, K, SILU)
        gradients += d_sum * taps[k]
    return gradients


@jit
def convolve_backward(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    initial: tl.tensor,
    ids: tl.tensor,
    starts: tl.tensor,
    dy: tl.tensor,
    dx: tl.tensor,
    parts: tl.tensor,
    meta: tl.tensor,
    rows: tl.tensor,
    texts: tl.tensor,
    strips: tl.tensor,
    x_row: tl.tensor,
    dy_row: tl.tensor,
    E: tl.tensor,
    K: tl.constexpr,
    SILU: tl.constexpr,
    FUSED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Compute the gradients. Each of the first `strips` programs writes its own sums for weight and bias.

    These sums are ``(E, K)`` for the weight, followed by ``(E,)`` for the bias. If the texts continue from the meta
    tokens (FUSED), one more program for each block of channels computes the gradients of the last K - 1 meta tokens,
    which all texts see.
    """
    e = (tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E))[None, :]
    strip = tl.program_id(0)
    i = tl.arange(0, BLOCK_K)[:, None]
    sums = tl.zeros((BLOCK_K, BLOCK_E), tl.float32)
    if strip < strips:
        taps, bias_e = _taps(weight, e, E, K), _bias(bias, e, E)
        for block in range(strip, tl.cdiv(rows, BLOCK_T), strips):
            t = (block * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]).to(tl.int64)
            inside = (t < rows) & (e < E)
            text, past, end = _text(t, ids, starts, meta, rows)
            d_sum = _sum_gradient(
                x, taps, bias_e, initial, dy, t, past, text, e, inside, meta, x_row, dy_row, E, K, SILU
            )
            gradient = d_sum * taps[0]
            if parts is not None:
                for k in tl.static_range(K):
                    lag = _lag(x, initial, t, past, text, k, e, inside, meta, x_row, E, K)
                    sums += tl.where(i == K - 1 - k, tl.sum(d_sum * lag, 0, keep_dims=True), 0.0)
                sums += tl.where(i == K, tl.sum(d_sum, 0, keep_dims=True), 0.0)

            for k in tl.static_range(1, K):
                seen = inside & (t + k < end)  # by the token k rows later, if it belongs to the same text
                d_sum = _sum_gradient(
                    x, taps, bias_e, initial, dy, t + k, past + k, text, e, seen, meta, x_row, dy_row, E, K, SILU
                )
                gradient += d_sum * taps[k]
            if FUSED:
                inside = inside & ((t < meta - (K - 1)) | (t >= meta))
            tl.store(dx + t * E + e, gradient, mask=inside)
        if parts is not None:
            place = tl.where(i < K, e * K + i, K * E + e)
            tl.store(parts + strip.to(tl.int64) * (K + 1) * E + place, sums, mask=(i <= K) & (e < E))
    elif FUSED:
        row = meta - i.to(tl.int64)
        inside = (row >= 0) & (i > 0) & (i < K) & (e < E)
        sums = _meta_gradients(x, weight, bias, starts, dy, meta, texts, x_row, dy_row, e, E, K, SILU, BLOCK_T, BLOCK_K)
        tl.store(dx + row * E + e, sums, mask=inside)
