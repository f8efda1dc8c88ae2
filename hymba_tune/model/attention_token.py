"""Attention of one new token of each text over the meta tokens and a cache.

Glossary: S texts, M meta tokens, H query heads, G key/value heads, C columns of a buffer, a width of a query or key
head, v width of a value head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import cached_attention
from .attention_token_triton import triton_attend
from .backends import GPU_DTYPES, Backend, Operation, Problem, Task, random_leaves
from .native import DTYPES
from .one_token_native import LIBRARY, native_attend
from .triton_kernels import triton_unavailable_reason


def attend(
    query: Tensor, meta: tuple[Tensor, Tensor] | None, key: Tensor, value: Tensor, lengths: Tensor, window: int | None
) -> Tensor:
    """Attend to the meta tokens, and to the tokens of each text that are at most ``window`` before the new one.

    The new token of text s is in column ``lengths[s] % C`` of the buffers, and every column holds the newest token
    whose position is that column modulo C.

    Args:
        query: ``(S, H, a)``.
        meta: Keys ``(M, G, a)`` and values ``(M, G, v)`` of the meta tokens, or None if the model has none.
        key: ``(S, G, C, a)``.
        value: ``(S, G, C, v)``.
        lengths: ``(S,)`` int64, the number of tokens of each text before the new one.
        window: The number of earlier tokens that a query sees, or None for the whole text.

    Returns:
        ``(S, H * v)``.
    """
    # Under autocast, the float32 weight of a head norm promotes queries and keys to float32.
    query = query.to(key.dtype)
    groups, _, value_width = value.shape[1:]
    task = Task.of(value, heads=(query.shape[1], groups), widths=(query.shape[2], value_width))
    output: Tensor = ATTEND.compute(task, query, meta, key, value, lengths, window)
    return output


def _masked_attend(
    query: Tensor, meta: tuple[Tensor, Tensor] | None, key: Tensor, value: Tensor, lengths: Tensor, window: int | None
) -> Tensor:
    # The age of a column is the number of tokens after the one that it holds.
    ages = (lengths[:, None] - torch.arange(key.shape[2], device=key.device)) % key.shape[2]
    hidden = ages > lengths[:, None]
    hidden = hidden if window is None else hidden | (ages > window)
    return cached_attention(query[:, None], meta, key, value, hidden[:, None]).squeeze(1)


def _small_problem(task: Task) -> Problem:
    """Return a problem of three texts: one token, less than a window, and more than a buffer."""
    meta, columns, window = 10, 200, 150
    heads, groups = task.heads
    width, value_width = task.widths
    shapes: list[tuple[int, ...]] = [(3, heads, width), (meta, groups, width), (meta, groups, value_width)]
    shapes += [(3, groups, columns, width), (3, groups, columns, value_width)]
    leaves = random_leaves(task, shapes)
    query, meta_key, meta_value, key, value = leaves
    lengths = torch.tensor([0, 70, 450], device=task.device)
    arguments = query, (meta_key, meta_value), key, value, lengths
    return Problem(lambda backend: tuple(backend.run(*arguments, limit) for limit in (window, None)), leaves)


ATTEND = Operation(
    "attend",
    [
        Backend(
            "triton",
            triton_attend,
            ("cuda",),
            GPU_DTYPES,
            gradients=False,
            needs_self_test=True,
            unavailable_reason=triton_unavailable_reason,
        ),
        Backend("native", native_attend, ("cpu",), DTYPES, unavailable_reason=LIBRARY.unavailable_reason),
        Backend("torch", _masked_attend),
    ],
    plain="torch",
    problem=_small_problem,
    trains=False,
)
"""The backends of `attend`, the fastest first."""
