"""The operations of one new token of each text on a GPU, in Triton: one launch each."""

from __future__ import annotations

import torch
from torch import Tensor

# With exported code, transformers copies the modules of these imports, but not those of `from . import`.
from .one_token_inputs import StateInputs, TokenInputs
from .one_token_kernels import multiply_gate_up, prepare_token, update_state
from .triton_kernels import INTERPRETED, OPTIONS, power_of_2, readable

BLOCK = 256
"""The number of elements of a program of `prepare`, which is one warp: 16 bytes of bfloat16 for each thread."""
CHANNELS = 16
"""The number of channels of a program of `update`."""
PROGRAMS = 4096
"""The number of programs of `update` above which each processes several texts: about two for each place on a GPU."""
COLUMNS = 32
"""The number of columns of a program of `gate_up`, few enough that all multiprocessors read weights."""
LEAST_ROWS = 16
"""The rows of the smallest matrix product of a GPU."""


def triton_prepare(inputs: TokenInputs) -> tuple[Tensor, Tensor]:
    """Compute `one_token.prepare`."""
    projected = readable(inputs.projected)
    texts = len(projected)
    channels, taps = inputs.conv_weight.shape
    width, heads = inputs.head_dim, inputs.widths[0] // inputs.head_dim
    key, value, tails = inputs.key, inputs.value, inputs.tails
    groups, value_width = (0, 1) if value is None else (value.shape[1], value.shape[3])

    weights = [None if norm is None else norm.contiguous() for norm in (inputs.q_norm, inputs.k_norm)]
    dtypes = [projected.dtype, *(weight.dtype for weight in weights[:1] if weight is not None)]
    query = projected.new_empty(texts, heads, width, dtype=torch.promote_types(dtypes[0], dtypes[-1]))
    x = projected.new_empty(texts, channels)
    cos, sin = (None, None) if inputs.tables is None else (readable(table.squeeze(1)) for table in inputs.tables)

    block_a = power_of_2(width)
    block_h = max(1, BLOCK // block_a)
    blocks = -(-heads // block_h) + 2 * -(-groups // block_h) + -(-channels // BLOCK)
    tensors = projected, *weights, cos, sin, key, value, inputs.lengths, inputs.conv_weight.contiguous()
    # Triton launches on the current device, which may be another GPU than that of the inputs.
    with torch.cuda.device_of(projected):
        prepare_token[texts, blocks](
            *tensors,
            inputs.conv_bias,
            tails,
            query,
            x,
            projected_row=projected.stride(0),
            table_row=0 if cos is None else cos.stride(0),
            **_strides("key", key),
            **_strides("value", value),
            tails_text=tails.stride(0),
            tails_row=tails.stride(1),
            columns=1 if key is None else key.shape[2],
            eps=inputs.eps,
            q_norm_head=_per_head(weights[0]),
            k_norm_head=_per_head(weights[1]),
            H=heads,
            G=groups,
            A=width,
            V=value_width,
            E=channels,
            K=taps,
            BLOCK_H=block_h,
            BLOCK_A=block_a,
            BLOCK_V=power_of_2(value_width),
            BLOCK_E=BLOCK,
            num_warps=1,
            **OPTIONS,
        )
    return query, x


def _strides(name: str, buffer: Tensor | None) -> dict[str, int]:
    strides = (0, 0, 0) if buffer is None else buffer.stride()[:3]
    return {
        f"{name}_{dimension}": stride for dimension, stride in zip(("text", "group", "column"), strides, strict=True)
    }


def _per_head(weight: Tensor | None) -> int:
    """Return the stride of the weights of heads, which is zero if the heads share one."""
    return 0 if weight is None or weight.ndim == 1 else weight.shape[1]


def triton_update(inputs: StateInputs) -> Tensor:
    """Compute `one_token.update`."""
    x, parameters, gate = (readable(rows) for rows in inputs[:3])
    channels, rank = inputs.dt_weight.shape
    states = inputs.A_log.shape[1]
    y = x.new_empty(x.shape)

    blocks = -(-channels // CHANNELS)
    count = max(1, len(x) * blocks // PROGRAMS)
    weights = (None if weight is None else weight.contiguous() for weight in (*inputs[3:6], *inputs[7:11]))
    # Triton launches on the current device, which may be another GPU than that of the inputs.
    with torch.cuda.device_of(x):
        update_state[blocks, -(-len(x) // count)](
            x,
            parameters,
            gate,
            *weights,
            inputs.state,
            y,
            x_row=x.stride(0),
            parameters_row=parameters.stride(0),
            gate_row=gate.stride(0),
            state_text=inputs.state.stride(0),
            texts=len(x),
            count=count,
            eps=inputs.eps,
            E=channels,
            R=rank,
            N=states,
            BLOCK_E=CHANNELS,
            BLOCK_R=power_of_2(rank),
            BLOCK_N=power_of_2(states),
            num_warps=4,
            **OPTIONS,
        )
    return y


def triton_gate_up(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Compute `few_rows.gate_up`."""
    x, gate, up = readable(x), gate.contiguous(), up.contiguous()
    inner, width = gate.shape
    y = x.new_empty(len(x), inner)
    block_m = max(LEAST_ROWS, power_of_2(len(x)))
    # Triton launches on the current device, which may be another GPU than that of the inputs.
    with torch.cuda.device_of(x):
        multiply_gate_up[(-(-inner // COLUMNS),)](
            x,
            gate,
            up,
            y,
            x_row=x.stride(0),
            rows=len(x),
            width=width,
            inner=inner,
            BLOCK_M=block_m,
            BLOCK_N=COLUMNS,
            BLOCK_K=64 if block_m <= 2 * LEAST_ROWS else 32,
            WIDE=INTERPRETED,
            num_warps=4 if block_m <= 2 * LEAST_ROWS else 8,
            num_stages=4 if block_m <= 4 * LEAST_ROWS else 3,
            **OPTIONS,
        )
    return y
