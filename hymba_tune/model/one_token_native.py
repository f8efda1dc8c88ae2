"""The operations of one new token of each text in C++ for the CPU: one call each, without copies of weights or cache.

Glossary: S texts, M meta tokens, H query heads, G key/value heads, C columns of a buffer, a width of a query or key
head, v width of a value head, E channels of the SSM, K width of the convolution, N size of a channel's state.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from .native import Arguments, Grid, Library, Rows, fields, readable, threads_for
from .one_token_inputs import StateInputs, TokenInputs
from .one_token_native_source import SOURCE

LIBRARY = Library("one_token", SOURCE)


class _PrepareArguments(Arguments):
    _fields_ = (
        *fields(ctypes.c_int64, "texts heads groups width value_width columns E K threads"),
        *fields(ctypes.c_float, "eps"),
        *fields(Rows, "projected q_norm k_norm cos sin"),
        *fields(Grid, "key value"),
        *fields(ctypes.c_void_p, "lengths"),
        *fields(Rows, "taps bias"),
        *fields(Grid, "tails"),
        *fields(Rows, "query x"),
    )


def native_prepare(inputs: TokenInputs) -> tuple[Tensor, Tensor]:
    """Compute `prepare` on the CPU, in float32 or bfloat16."""
    projected = readable(inputs.projected)
    texts, width = len(projected), inputs.head_dim
    heads = inputs.widths[0] // width
    channels, taps = inputs.conv_weight.shape

    stored: dict[str, Any] = {}
    if inputs.key is not None and inputs.value is not None:
        _, groups, columns, value_width = inputs.value.shape
        stored = {"groups": groups, "columns": columns, "value_width": value_width}
        stored |= {"key": _buffer(inputs.key), "value": _buffer(inputs.value)}
        stored |= {"k_norm": _by_head(inputs.k_norm, groups)}
    tables: dict[str, Any] = {}
    if inputs.tables is not None:
        tables = {name: readable(table[:, 0]) for name, table in zip(("cos", "sin"), inputs.tables, strict=True)}

    norm = projected if inputs.q_norm is None else inputs.q_norm
    query = projected.new_empty(texts, heads, width, dtype=torch.promote_types(projected.dtype, norm.dtype))
    x = projected.new_empty(texts, channels)
    arguments = _PrepareArguments(
        **stored,
        **tables,
        texts=texts,
        heads=heads,
        width=width,
        E=channels,
        K=taps,
        threads=threads_for(2 * projected.numel()),
        eps=inputs.eps,
        projected=projected,
        q_norm=_by_head(inputs.q_norm, heads),
        lengths=inputs.lengths,
        taps=readable(inputs.conv_weight),
        bias=_row(inputs.conv_bias),
        tails=inputs.tails,
        query=query.flatten(0, 1),
        x=x,
    )
    LIBRARY.call("prepare", arguments)
    return query, x


class _AttendArguments(Arguments):
    _fields_ = (
        *fields(ctypes.c_int64, "texts heads groups width value_width columns meta window threads"),
        *fields(Rows, "query"),
        *fields(Grid, "meta_key meta_value key value"),
        *fields(ctypes.c_void_p, "lengths"),
        *fields(Rows, "output"),
    )


def native_attend(
    query: Tensor, meta: tuple[Tensor, Tensor] | None, key: Tensor, value: Tensor, lengths: Tensor, window: int | None
) -> Tensor:
    """Compute `attend` on the CPU, in float32 or bfloat16."""
    query, key, value = map(readable, (query, key, value))
    meta = None if meta is None else (readable(meta[0]), readable(meta[1]))
    texts, heads, width = query.shape
    _, groups, columns, value_width = value.shape
    meta_tokens = 0 if meta is None else len(meta[0])
    keys = columns if window is None else min(columns, window + 1)

    output = query.new_empty(texts, heads * value_width, dtype=value.dtype)
    arguments = _AttendArguments(
        texts=texts,
        heads=heads,
        groups=groups,
        width=width,
        value_width=value_width,
        columns=columns,
        meta=meta_tokens,
        window=-1 if window is None else window,
        threads=threads_for(texts * heads * (meta_tokens + keys) * (width + value_width) // 8),
        query=query.flatten(0, 1),
        meta_key=None if meta is None else meta[0],
        meta_value=None if meta is None else meta[1],
        key=_buffer(key),
        value=_buffer(value),
        lengths=lengths,
        output=output.view(texts * heads, value_width),
    )
    LIBRARY.call("attend", arguments)
    return output


class _UpdateArguments(Arguments):
    _fields_ = (
        *fields(ctypes.c_int64, "texts E rank N threads"),
        *fields(ctypes.c_float, "eps"),
        *fields(Rows, "x parameters gate dt_norm B_norm C_norm dt_weight dt_bias A_log D"),
        *fields(Grid, "state"),
        *fields(Rows, "y"),
    )


def native_update(inputs: StateInputs) -> Tensor:
    """Compute `update` on the CPU, in float32 or bfloat16."""
    channels, rank = inputs.dt_weight.shape
    states = inputs.A_log.shape[1]
    y = inputs.x.new_empty(inputs.x.shape)
    arguments = _UpdateArguments(
        texts=len(y),
        E=channels,
        rank=rank,
        N=states,
        threads=threads_for(y.numel() * (rank + 2 * states) // 2),
        eps=inputs.eps,
        x=readable(inputs.x),
        parameters=readable(inputs.parameters),
        gate=readable(inputs.gate),
        dt_norm=_row(inputs.dt_norm),
        B_norm=_row(inputs.B_norm),
        C_norm=_row(inputs.C_norm),
        dt_weight=readable(inputs.dt_weight),
        dt_bias=_row(inputs.dt_bias),
        A_log=readable(inputs.A_log),
        D=_row(inputs.D),
        state=inputs.state,
        y=y,
    )
    LIBRARY.call("update", arguments)
    return y


def _by_head(weight: Tensor | None, heads: int) -> Tensor | None:
    """Return the weight of a norm as ``(heads, a)`` without copying one that is shared by all heads."""
    return None if weight is None else readable(weight).expand(heads, -1)


def _row(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else readable(weight)[None]


def _buffer(x: Tensor) -> Tensor:
    """View a buffer ``(S, G, C, width)`` as ``(S * G, C, width)``, since the C++ writes into it."""
    return x.view(-1, *x.shape[2:])
