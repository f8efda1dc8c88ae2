"""The kernels of attention of one new token of each text, which `attention_token_triton` launches.

A program attends from the R queries of one group to a part of the keys that one text sees, a block at a time, so that
each key and value is read once. If a text has several parts, a second kernel merges them by the logarithms of their
softmax denominators. The denominators are in base 2, for exp2.

The keys that a text sees in its buffer are numbered by age, the oldest first. Blocks of meta tokens come before them.

Glossary: S texts, M meta tokens, H query heads, G key/value heads, R = H / G query heads per key head, C columns of a
buffer, a width of a query or key head, v width of a value head, P parts of a text's keys.
"""

from __future__ import annotations

from .triton_kernels import jit, tl


@jit
def attend_to_part(
    query: tl.tensor,
    meta_key: tl.tensor,
    meta_value: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    lengths: tl.tensor,
    output: tl.tensor,
    lse: tl.tensor,
    scale: tl.tensor,
    meta: tl.tensor,
    columns: tl.tensor,
    window: tl.tensor,
    query_stride: tl.tensor,
    key_text: tl.tensor,
    key_group: tl.tensor,
    key_row: tl.tensor,
    value_text: tl.tensor,
    value_group: tl.tensor,
    value_row: tl.tensor,
    meta_key_row: tl.tensor,
    meta_key_group: tl.tensor,
    meta_value_row: tl.tensor,
    meta_value_group: tl.tensor,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_V: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """Attend to one part of the keys. The output is normalized within the part.

    With WIDE, products are computed in float32, since Triton's interpreter has none in bfloat16.
    """
    text = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    heads = tl.num_programs(1) * R
    head = tl.arange(0, BLOCK_R)
    a = tl.arange(0, BLOCK_A)
    v = tl.arange(0, BLOCK_V)
    row = tl.arange(0, BLOCK)
    is_head = head < R

    # A window counts the tokens before the new one, which is in the buffer already.
    length = tl.load(lengths + text)
    seen = tl.minimum(tl.minimum(length, window) + 1, columns).to(tl.int32)
    oldest = ((length + 1 - seen) % columns).to(tl.int32)
    meta_blocks = tl.cdiv(meta, BLOCK)
    blocks = meta_blocks + tl.cdiv(seen, BLOCK)
    first = part * blocks // PARTS
    end = (part + 1) * blocks // PARTS

    at = text * query_stride + (group * R + head[:, None]) * WIDTH + a[None, :]
    queries = tl.load(query + at, mask=is_head[:, None] & (a < WIDTH)[None, :], other=0.0)
    queries = queries.to(tl.float32) if WIDE else queries
    highest = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    attended = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    for block in range(first, end):
        is_meta = block < meta_blocks
        index = tl.where(is_meta, block, block - meta_blocks) * BLOCK + row
        inside = index < tl.where(is_meta, meta, seen)
        column = oldest + index
        column = tl.where(column < columns, column, column - columns)
        column = tl.where(is_meta, index, column).to(tl.int64)
        keys = tl.where(is_meta, meta_key + group * meta_key_group, key + text * key_text + group * key_group)
        values = tl.where(
            is_meta, meta_value + group * meta_value_group, value + text * value_text + group * value_group
        )
        key_at = column[None, :] * tl.where(is_meta, meta_key_row, key_row) + a[:, None]
        value_at = column[:, None] * tl.where(is_meta, meta_value_row, value_row) + v[None, :]

        k = tl.load(keys + key_at, mask=inside[None, :] & (a < WIDTH)[:, None], other=0.0)
        k = k.to(tl.float32) if WIDE else k
        scores = tl.where(inside[None, :], tl.dot(queries, k, input_precision="ieee") * scale, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        kept = tl.exp2(highest - higher)
        total = total * kept + tl.sum(weights, 1)

        x = tl.load(values + value_at, mask=inside[:, None] & (v < VALUE_WIDTH)[None, :], other=0.0)
        x = x.to(tl.float32) if WIDE else x
        attended = attended * kept[:, None] + tl.dot(weights.to(x.dtype), x, input_precision="ieee")
        highest = higher

    # A part without keys has a denominator of zero, whose logarithm is minus infinity, as is `highest`.
    total = tl.where(total > 0, total, 1.0)
    to = (text * heads + group * R + head) * PARTS + part
    is_output = is_head[:, None] & (v < VALUE_WIDTH)[None, :]
    result = (attended / total[:, None]).to(output.dtype.element_ty)
    tl.store(output + to[:, None] * VALUE_WIDTH + v[None, :], result, mask=is_output)
    if PARTS > 1:
        tl.store(lse + to, highest + tl.log2(total), mask=is_head)


@jit
def merge_parts(
    parts: tl.tensor,
    lse: tl.tensor,
    output: tl.tensor,
    VALUE_WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
) -> None:
    """Merge the parts of one head of one text."""
    head = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, BLOCK_P)
    v = tl.arange(0, BLOCK_V)
    is_part = p < PARTS
    is_value = v < VALUE_WIDTH

    sizes = tl.load(lse + head * PARTS + p, mask=is_part, other=float("-inf"))
    shares = tl.exp2(sizes - tl.max(sizes, 0))
    at = (head * PARTS + p)[:, None] * VALUE_WIDTH + v[None, :]
    attended = tl.load(parts + at, mask=is_part[:, None] & is_value[None, :], other=0.0)
    merged = tl.sum(attended * shares[:, None], 0) / tl.sum(shares, 0)
    tl.store(output + head * VALUE_WIDTH + v, merged.to(output.dtype.element_ty), mask=is_value)
