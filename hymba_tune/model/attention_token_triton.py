"""Attention of one new token of each text on a GPU, in Triton: flash-decoding (arXiv 2311.01282, section 3).

The keys of a text are divided among as many programs as fill the GPU, by the number of texts and the size of the
buffers alone, so that nothing waits for the lengths of the texts and a CUDA graph can be replayed for any lengths. The
block sizes follow from registers and shared memory of the compiled kernels; they have not been timed on a GPU.

Glossary: S texts, M meta tokens, H query heads, G key/value heads, C columns of a buffer, a width of a query or key
head, v width of a value head.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

# With exported code, transformers copies the modules of these imports, but not those of `from . import`.
from .attention_token_kernels import attend_to_part, merge_parts
from .triton_kernels import INTERPRETED, OPTIONS, power_of_2, readable

KEYS = {2: 32, 4: 16}
"""The number of keys in a block, by the bytes of a number. With 64 keys of 2 bytes gfx1100 would spill registers."""
WARPS = {2: 4, 4: 8}
"""The number of warps of a program, by the bytes of a number. With 4 warps, 4 bytes would spill there as well."""
LEAST = 2
"""The smallest number of blocks in a part, so that reading hides the start of a program."""
MOST = 64
"""The largest number of parts, which one program merges."""
PROGRAMS = 2
"""The number of programs for each multiprocessor that the parts of all texts aim at."""
LEAST_SIDE = 16
"""The smallest side of a matrix product in Triton."""
WITHOUT_WINDOW = 2**31 - 2
"""A window that no text fills."""


def triton_attend(
    query: Tensor, meta: tuple[Tensor, Tensor] | None, key: Tensor, value: Tensor, lengths: Tensor, window: int | None
) -> Tensor:
    """Compute `attend` in one launch, or in two if a text has several parts.

    Args:
        query: ``(S, H, a)``.
        meta: Keys ``(M, G, a)`` and values ``(M, G, v)`` of the meta tokens, or None if the model has none.
        key: ``(S, G, C, a)``.
        value: ``(S, G, C, v)``.
        lengths: ``(S,)`` int64, the number of tokens of each text before the new one.
        window: The number of earlier tokens that a query sees, or None for the whole text.

    Returns:
        ``(S, H * v)`` in the dtype of the values.
    """
    texts, heads, width = query.shape
    groups, columns, value_width = value.shape[1:]
    meta = meta or (key.new_empty(0, 1, 1), value.new_empty(0, 1, 1))
    meta_key, meta_value = map(readable, meta)
    # The heads of a text are adjacent; texts may be rows of a wider matrix.
    query = query if query.stride()[1:] == (width, 1) else query.contiguous()
    key, value = readable(key), readable(value)

    number = max(key.element_size(), value.element_size())
    block = KEYS[number]
    most_keys = columns if window is None else min(columns, window + 1)
    blocks = -(-len(meta_key) // block) - (-most_keys // block)
    parts = _parts(texts * groups, blocks, query.device)
    output = value.new_empty(texts, heads, value_width)
    by_part, lse = output, output
    if parts > 1:
        by_part = value.new_empty(texts, heads, parts, value_width, dtype=torch.float32)
        lse = value.new_empty(texts, heads, parts, dtype=torch.float32)

    sizes = {"R": heads // groups, "WIDTH": width, "VALUE_WIDTH": value_width, "PARTS": parts, "BLOCK": block}
    sides = (heads // groups, width, value_width)
    padded = dict(zip(("BLOCK_R", "BLOCK_A", "BLOCK_V"), (max(LEAST_SIDE, power_of_2(x)) for x in sides), strict=True))
    strides = query.stride(0), *key.stride()[:3], *value.stride()[:3], *meta_key.stride()[:2], *meta_value.stride()[:2]
    limits = len(meta_key), columns, WITHOUT_WINDOW if window is None else window
    # Triton launches on the current device, which may be another GPU than that of the inputs.
    with torch.cuda.device_of(query):
        attend_to_part[(texts, groups, parts)](
            *(query, meta_key, meta_value, key, value, lengths, by_part, lse),
            *(width**-0.5 * math.log2(math.e), *limits, *strides),
            **sizes,
            **padded,
            WIDE=INTERPRETED,
            num_warps=WARPS[number],
            num_stages=2,
            **OPTIONS,
        )
        if parts > 1:
            merge_parts[(texts * heads,)](
                *(by_part, lse, output),
                VALUE_WIDTH=value_width,
                PARTS=parts,
                BLOCK_P=power_of_2(parts),
                BLOCK_V=padded["BLOCK_V"],
                num_warps=4,
                **OPTIONS,
            )
    return output.flatten(1)


def _parts(pairs: int, blocks: int, device: torch.device) -> int:
    """Return the number of parts of a text's keys, a power of two, for a number of pairs of a text and a group."""
    wanted = PROGRAMS * _multiprocessors(device) // pairs
    parts = max(1, min(wanted, blocks // LEAST, MOST))
    # Each number is compiled for, so there are few of them.
    return 1 << (parts.bit_length() - 1)


@lru_cache(maxsize=8)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
