"""The small operations of a layer where every text of a cache has one new token, as in a step of generation.

They surround the matrix products and the attention of the layer, read the small weights themselves, and advance the
cache in place: nothing that they allocate depends on how long the texts are.

Glossary: S texts, W width of the input projection, H query heads, G key/value heads, C columns of a buffer, a width of
a query or key head, v width of a value head, E channels of the SSM, K width of the convolution, N size of a channel's
state, R rank of the time steps.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from .autocast import at_least_float32
from .backends import GPU_DTYPES, Backend, Operation, Problem, Task, random_leaves
from .convolution import causal_conv1d
from .elementwise import rms_norm, rotate
from .native import DTYPES
from .one_token_inputs import StateInputs, TokenInputs
from .one_token_native import LIBRARY, native_prepare, native_update
from .one_token_triton import triton_prepare, triton_update
from .scan import selective_scan
from .triton_kernels import triton_unavailable_reason


def prepare(inputs: TokenInputs) -> tuple[Tensor, Tensor]:
    """Norm and rotate the heads, write the new keys and values into the cache, convolve and apply silu.

    The key and value of text s go to column ``lengths[s] % C``. The tails move on by one token.

    Returns:
        The queries ``(S, H, a)`` and x ``(S, E)``.
    """
    groups, value_dim = (0, 0) if inputs.value is None else (inputs.value.shape[1], inputs.value.shape[3])
    sizes = (inputs.widths[0] // inputs.head_dim, inputs.head_dim, groups, value_dim, *inputs.conv_weight.shape)
    query, x = PREPARE.compute(Task.of(inputs.projected, sizes=sizes), inputs)
    return query, x


def update(inputs: StateInputs) -> Tensor:
    """Advance the states of the SSM by one token.

    Returns:
        The gated output ``(S, E)`` in x's dtype.
    """
    y: Tensor = UPDATE.compute(Task.of(inputs.x, sizes=(*inputs.dt_weight.shape, inputs.A_log.shape[1])), inputs)
    return y


def _separate_prepare(inputs: TokenInputs) -> tuple[Tensor, Tensor]:
    query, key, value, x, _ = inputs.projected.split(inputs.widths, -1)
    if inputs.key is not None and inputs.value is not None:
        texts = torch.arange(len(x), device=x.device)
        columns = inputs.lengths % inputs.key.shape[2]
        inputs.key[texts, :, columns] = _heads(key, inputs.k_norm, inputs).to(inputs.key.dtype)
        inputs.value[texts, :, columns] = value.unflatten(-1, (-1, inputs.value.shape[3])).to(inputs.value.dtype)

    weight = inputs.conv_weight.to(x.dtype)
    x, tails = causal_conv1d(x, weight, inputs.conv_bias, initial=inputs.tails, cu_seqlens=range(len(x) + 1))
    inputs.tails.copy_(tails)
    return _heads(query, inputs.q_norm, inputs), silu(x)


def _heads(flat: Tensor, norm: Tensor | None, inputs: TokenInputs) -> Tensor:
    heads = flat.unflatten(-1, (-1, inputs.head_dim))
    if norm is not None:
        heads = rms_norm(heads, norm, inputs.eps)
    return heads if inputs.tables is None else rotate(heads, inputs.tables)


def _separate_update(inputs: StateInputs) -> Tensor:
    states = inputs.A_log.shape[1]
    dt, B, C = inputs.parameters.split([inputs.parameters.shape[1] - 2 * states, states, states], -1)
    norms = inputs.dt_norm, inputs.B_norm, inputs.C_norm
    dt, B, C = (x if norm is None else rms_norm(x, norm, inputs.eps) for x, norm in zip((dt, B, C), norms, strict=True))

    weight = at_least_float32(inputs.dt_weight)
    bias = None if inputs.dt_bias is None else inputs.dt_bias.to(weight.dtype)
    dt = linear(dt.to(weight.dtype), weight, bias)
    A = -torch.exp(at_least_float32(inputs.A_log))
    offsets = range(len(dt) + 1)
    y, final = selective_scan(
        inputs.x, dt, A, B, C, inputs.D, inputs.gate, initial_state=inputs.state, cu_seqlens=offsets
    )
    inputs.state.copy_(final)
    return y


def _small_preparation(task: Task) -> Problem:
    """Return a problem of three texts, one of which overwrites an old token, in the sizes of the task."""
    heads, width, groups, value_width, channels, taps = task.sizes or (10, 64, 2, 128, 96, 4)
    groups, value_width = groups or 1, value_width or 2 * width
    texts, columns = 3, 5
    shapes: list[tuple[int, ...]] = [(texts, heads * width + groups * (width + value_width) + 2 * channels)]
    shapes += [(width,), (width,), (texts, 1, width), (texts, 1, width), (channels, taps), (channels,)]
    shapes += [(texts, groups, columns, width), (texts, groups, columns, value_width), (texts, taps - 1, channels)]
    leaves = random_leaves(replace(task, gradients=False), shapes)
    projected, q_norm, k_norm, cos, sin, weight, bias = leaves[:7]
    lengths = torch.tensor([0, 3, 8], device=task.device)

    def compute(backend: Backend) -> tuple[Tensor, ...]:
        key, value, tails = (x.clone() for x in leaves[7:])
        tables = cos, sin
        inputs = TokenInputs(projected, width, q_norm, k_norm, 1e-6, tables, key, value, lengths, weight, bias, tails)
        return *backend.run(inputs), key, value, tails

    return Problem(compute, leaves)


def _small_update(task: Task) -> Problem:
    """Return a problem of three texts with all arguments, in the sizes of the task and the dtypes of a model."""
    channels, rank, states = task.sizes or (96, 12, 16)
    task = replace(task, gradients=False)
    texts = 3
    x, gate, parameters = random_leaves(task, [(texts, channels)] * 2 + [(texts, rank + 2 * states)])
    dt_norm, B_norm, C_norm, D = random_leaves(task, [(rank,), (states,), (states,), (channels,)])
    wide = replace(task, dtype=torch.promote_types(task.dtype, torch.float32))
    shapes = [(channels, rank), (channels,), (channels, states), (texts, channels, states)]
    weight, bias, rates, state = random_leaves(wide, shapes)

    def compute(backend: Backend) -> tuple[Tensor, ...]:
        new = state.clone()
        weights = weight / rank**0.5, bias, rates, D
        y = backend.run(StateInputs(x, parameters, gate, dt_norm, B_norm, C_norm, 1e-6, *weights, new))
        return y, new

    return Problem(compute, [x, gate, parameters])


PREPARE = Operation(
    "prepare",
    [
        Backend(
            "triton",
            triton_prepare,
            ("cuda",),
            GPU_DTYPES,
            needs_self_test=True,
            unavailable_reason=triton_unavailable_reason,
        ),
        Backend("native", native_prepare, ("cpu",), DTYPES, unavailable_reason=LIBRARY.unavailable_reason),
        Backend("separate", _separate_prepare),
    ],
    plain="separate",
    problem=_small_preparation,
    trains=False,
)
"""The backends of `prepare`, the fastest first. That of separate operations takes the chosen backends of each."""
UPDATE = Operation(
    "update",
    [
        Backend(
            "triton",
            triton_update,
            ("cuda",),
            GPU_DTYPES,
            needs_self_test=True,
            unavailable_reason=triton_unavailable_reason,
        ),
        Backend("native", native_update, ("cpu",), DTYPES, unavailable_reason=LIBRARY.unavailable_reason),
        Backend("separate", _separate_update),
    ],
    plain="separate",
    problem=_small_update,
    trains=False,
)
"""The backends of `update`, the fastest first."""
