"""The kernels of the selective scan's forward on a GPU, which `scan_triton` launches.

    s_t = exp(delta_t A) * s_{t-1} + x_t B_t^T        y_t = (s_t C_t + D * u_t) * silu(z_t)

A program processes one chunk of one text, and some channels. It holds a state, ``(N, E)``, and loops over time.

The arguments are pointers and, by name, row strides and sizes. `starts` contains the first row of each chunk, followed
by T. Values of chunks have the layout ``(chunks, N, E)`` or ``(chunks, E)``; adjacent threads then read adjacent
channels. Rows, texts and chunks are 64-bit integers, because offsets into large tensors exceed 32 bits.

Glossary: T tokens, E channels, N size of a channel's state; e, n, t indices of channels, states and tokens; u input,
dt time step before softplus, delta time step after it, z gate, x = delta * u. CARD is the name of the card, for which
block sizes are chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = None


def jit(kernel: Callable[..., Any]) -> Any:
    """Apply `triton.jit`; without Triton, return the function unchanged, since nothing calls it."""
    return kernel if triton is None else triton.jit(kernel)


def tuned(*configs: dict[str, int]) -> Callable[[Any], Any]:
    """Choose block sizes and the number of warps on the user's card; Triton keeps the choice on disk.

    Args:
        *configs: What to try. The first one is taken for few channels, for which trying takes longer than it saves, and
            where Triton is interpreted.
    """

    def tune(kernel: Any) -> Any:
        if triton is None:
            return kernel
        options = ("num_warps", "maxnreg")
        choices = [
            triton.Config(
                {name: size for name, size in config.items() if name not in options},
                **{name: size for name, size in config.items() if name in options},
            )
            for config in configs
        ]
        return triton.autotune(
            choices if isinstance(kernel, triton.JITFunction) else choices[:1],
            key=["E", "N", "CARD"],
            prune_configs_by={"early_config_prune": _worthwhile},
            cache_results=True,
        )(kernel)

    return tune


SIZES = ({"STATES": 1024, "num_warps": 2}, {"STATES": 512, "num_warps": 1}, {"STATES": 512, "num_warps": 2})
"""For the passes over chunks. A thread holds 8 or 16 states, and as many elements of A."""


def _worthwhile(configs: list[Any], _: dict[str, Any], **sizes: Any) -> list[Any]:
    if sizes["E"] <= 512:
        return configs[:1]
    is_amd = triton.runtime.driver.active.get_current_target().backend == "hip"
    return [config for config in configs if not (is_amd and config.maxnreg)]  # NVIDIA's compiler takes this limit


@jit
def _load(pointer: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Load values in float32, with zeros where the mask is False."""
    return tl.load(pointer, mask=inside, other=0.0).to(tl.float32)


@jit
def _softplus(x: tl.tensor) -> tl.tensor:
    """Compute log(1 + exp(x)) to full precision: log(1 + r) is 2 artanh(r / (2 + r)), of which this is the series."""
    # exp(-|x|) cannot overflow; a plain log(1 + r) would lose a small r to rounding.
    r = tl.exp(-tl.abs(x))
    q = r / (r + 2.0)
    s = q * q
    series = 1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s * (1 / 11 + s * (1 / 13 + s * (1 / 15))))))
    return tl.maximum(x, 0.0) + 2.0 * (q + q * s * series)


@jit
def _load_step(dt: tl.tensor, dt_bias: tl.tensor, at: tl.tensor, e: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Load time steps before softplus, with their bias."""
    step = _load(dt + at, inside)
    if dt_bias is not None:
        step += _load(dt_bias + e, inside)
    return step


@jit
def _load_exponents(A: tl.tensor, n: tl.tensor, e: tl.tensor, N: tl.constexpr, inside: tl.tensor) -> tl.tensor:
    """Load A, ``(E, N)``, for exp2."""
    return _load(A + e[None, :] * N + n[:, None], inside) * 1.4426950408889634


@jit
def _offsets(E: tl.tensor, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr) -> tuple[tl.tensor, ...]:
    """Return the channels and states of the program, the masks of those that exist, and offsets into ``(N, E)``."""
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    return e, n, e < E, n < N, (n < N)[:, None] & (e < E)[None, :], n[:, None] * E + e[None, :]


@tuned(*SIZES)
@jit
def chunk_ends(
    u: tl.tensor,
    dt: tl.tensor,
    A: tl.tensor,
    B: tl.tensor,
    dt_bias: tl.tensor,
    starts: tl.tensor,
    needed: tl.tensor,
    ends: tl.tensor,
    times: tl.tensor,
    u_stride: tl.constexpr,
    dt_stride: tl.constexpr,
    B_stride: tl.constexpr,
    E: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STATES: tl.constexpr,
    CARD: tl.constexpr,
) -> None:
    """Compute the states at the ends of the chunks in `needed` if they started from zeros, and sums of time steps."""
    chunk = tl.load(needed + tl.program_id(0)).to(tl.int64)
    first, last = tl.load(starts + chunk).to(tl.int64), tl.load(starts + chunk + 1)
    BLOCK_E: tl.constexpr = STATES // BLOCK_N if STATES > BLOCK_N else 1
    e, n, is_e, is_n, is_ne, offset = _offsets(E, N, BLOCK_N, BLOCK_E)
    A_e = _load_exponents(A, n, e, N, is_ne)
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


@jit
def carry(
    A: tl.tensor,
    initial: tl.tensor,
    chunks: tl.tensor,
    added: tl.tensor,
    times: tl.tensor,
    carried: tl.tensor,
    last: tl.tensor,
    begin_text: tl.tensor,
    texts: tl.tensor,
    initial_stride: tl.tensor,
    E: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BACKWARDS: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """Compute the states in front of the chunks of a text, or BACKWARDS the gradients of the states at their ends.

    Both follow from what each chunk adds. `chunks` contains the first chunk of each text, followed by their number. If
    the texts are CHAINED, those after text 0 start from its end, and its gradient starts from the sum of theirs.

    `last` receives the final states of texts without tokens, or BACKWARDS the gradients of all initial states; these
    are not wanted if it is None.
    """
    text = begin_text + tl.program_id(0).to(tl.int64)
    n = tl.program_id(2)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    i = tl.arange(0, BLOCK)[:, None]
    first = tl.load(chunks + text).to(tl.int64)
    count = tl.load(chunks + text + 1) - first
    A_e = _load(A + e * N + n, e < E) * 1.4426950408889634
    state = tl.zeros((BLOCK_E,), tl.float32)
    if initial is not None:
        state = _load(initial + text * initial_stride + e * N + n, e < E)
    if CHAINED and BACKWARDS:
        for begin in range(1, tl.where(text == 0, texts, 0), BLOCK):
            other = (begin + i).to(tl.int64)
            inside = (other < texts) & (e < E)[None, :]
            state += tl.sum(_load(last + (other * E + e[None, :]) * N + n, inside), 0)
    if CHAINED and not BACKWARDS:
        begin_chunk = tl.load(chunks).to(tl.int64)
        for number in range(tl.where(text == 0, 0, tl.load(chunks + 1))):
            chunk = begin_chunk + number
            decay = tl.exp2(A_e * _load(times + chunk * E + e, e < E))
            state = decay * state + _load(added + (chunk * N + n) * E + e, e < E)

    # What the last chunk adds is not needed, unless it reaches an initial state.
    added_count = count - 1
    if BACKWARDS and last is not None:
        added_count = count
    for begin in range(0, count, BLOCK):
        # All loads of a block of chunks come before its stores, so that no load has to wait for a store.
        states = tl.zeros((BLOCK, BLOCK_E), tl.float32)
        for j in tl.static_range(BLOCK):
            chunk = first + begin + j
            if BACKWARDS:
                chunk = first + count - 1 - begin - j
            inside = e < tl.where(begin + j < added_count, E, 0)
            states = tl.where(i == j, state[None, :], states)
            decay = tl.exp2(A_e * _load(times + chunk * E + e, inside))
            state = decay * state + _load(added + (chunk * N + n) * E + e, inside)

        chunk = first + begin + i
        if BACKWARDS:
            chunk = first + count - 1 - begin - i
        tl.store(carried + (chunk * N + n) * E + e[None, :], states, mask=(e < E)[None, :] & (begin + i < count))
    if BACKWARDS and last is not None:
        tl.store(last + (text * E + e) * N + n, state, mask=e < E)
    if not BACKWARDS:
        tl.store(last + (text * E + e) * N + n, state, mask=e < tl.where(count == 0, E, 0))


@tuned(*SIZES)
@jit
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
    ending: tl.tensor,
    fronts: tl.tensor,
    y: tl.tensor,
    final: tl.tensor,
    u_stride: tl.constexpr,
    dt_stride: tl.constexpr,
    B_stride: tl.constexpr,
    C_stride: tl.constexpr,
    z_stride: tl.constexpr,
    E: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STATES: tl.constexpr,
    CARD: tl.constexpr,
) -> None:
    """Compute y of each chunk from the state in front of it, and the final state of the text that is `ending` there.

    `ending` is -1 for chunks at whose end no text ends.
    """
    chunk = tl.program_id(0).to(tl.int64)
    first, last = tl.load(starts + chunk).to(tl.int64), tl.load(starts + chunk + 1)
    BLOCK_E: tl.constexpr = STATES // BLOCK_N if STATES > BLOCK_N else 1
    e, n, is_e, is_n, is_ne, offset = _offsets(E, N, BLOCK_N, BLOCK_E)
    A_e = _load_exponents(A, n, e, N, is_ne)
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

    text = tl.load(ending + chunk).to(tl.int64)
    ends = (e < tl.where(text < 0, 0, E))[None, :]
    tl.store(final + (text * E + e[None, :]) * N + n[:, None], state, mask=is_ne & ends)


INSTALLED = triton is not None
INTERPRETED = INSTALLED and not isinstance(carry, triton.JITFunction)
"""Whether Triton was imported under TRITON_INTERPRET=1, so that the kernels run in Python, on any device."""
