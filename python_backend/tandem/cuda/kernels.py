"""Kernels in the Triton language; what each computes is said where it is launched.

`TRITON_INTERPRET=1`, set before this is imported, runs them on a CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend_parts(
    query,  # [num_heads, num_tokens, head_dim], with strides
    keys,  # [num_slots, num_kv_heads, head_dim]
    values,
    parts,  # [NUM_PARTS, num_tokens, num_heads, head_dim], float32
    states,  # [NUM_PARTS, num_tokens, num_heads, 2], float32
    spans,  # [num_spans, 4]: first row, number of queries, kv_len, place of the table
    tables,
    num_spans,
    num_tokens,
    head_stride,
    token_stride,
    scaling,
    BLOCK_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_ELEMENTS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    IS_FLOAT32: tl.constexpr,
):
    """One tile of queries of a span and a KV head, and the splits that are this part's."""
    tile, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # The last span whose tiles begin at this one or before.
    low, high = 0, num_spans
    while low < high - 1:
        middle = (low + high) // 2
        is_behind = tl.load(spans + 4 * middle) // TILE_TOKENS + middle > tile
        low = tl.where(is_behind, low, middle)
        high = tl.where(is_behind, middle, high)
    span = spans + 4 * low
    first_row = tl.load(span)
    num_queries, kv_len = tl.load(span + 1), tl.load(span + 2)
    table = tables + tl.load(span + 3).to(tl.int64)
    start = (tile - first_row // TILE_TOKENS - low) * TILE_TOKENS
    if start >= num_queries:
        return

    rows = tl.arange(0, TILE_ROWS)
    tokens = start + rows // NUM_GROUPS
    heads = kv_head * NUM_GROUPS + rows % NUM_GROUPS
    elements = tl.arange(0, NUM_ELEMENTS)
    has_row = (rows < TILE_TOKENS * NUM_GROUPS) & (tokens < num_queries)
    has_element = elements < HEAD_DIM
    places = heads.to(tl.int64) * head_stride + (first_row + tokens).to(tl.int64) * token_stride
    q = tl.load(
        query + places[:, None] + elements[None, :],
        mask=has_row[:, None] & has_element[None, :],
        other=0.0,
    )
    # Keys that the tile's first and last query see, and each row.
    last_token = tl.minimum(start + TILE_TOKENS, num_queries) - 1
    if CAUSAL:
        stops = kv_len - num_queries + tokens + 1
        stop = kv_len - num_queries + last_token + 1
        earliest = kv_len - num_queries + start + 1
    else:
        stops = tl.zeros([TILE_ROWS], tl.int32) + kv_len
        stop = kv_len
        earliest = kv_len
    first = 0
    firsts = tl.zeros([TILE_ROWS], tl.int32)
    if WINDOW > 0:
        # transformers' bidirectional window includes both ends.
        reach = WINDOW if CAUSAL else WINDOW + 1
        first = tl.maximum(0, earliest - reach)
        firsts = tl.maximum(0, stops - reach)

    # The first split of this part that is not before all that is seen.
    split = first // SPLIT
    split += (part - split % NUM_PARTS + NUM_PARTS) % NUM_PARTS
    if split * SPLIT >= stop:
        return
    highest = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    result = tl.zeros([TILE_ROWS, NUM_ELEMENTS], tl.float32)
    offsets = tl.arange(0, TILE_KEYS)
    while split * SPLIT < stop:
        begin = tl.maximum(split * SPLIT, first // TILE_KEYS * TILE_KEYS)
        end = tl.minimum(split * SPLIT + SPLIT, stop)
        for at in range(begin, end, TILE_KEYS):
            positions = at + offsets
            is_read = (positions >= first) & (positions < stop)
            blocks = tl.load(table + positions // BLOCK_SIZE, mask=is_read, other=0)
            slots = blocks.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
            key_places = (slots * NUM_KV_HEADS + kv_head) * HEAD_DIM
            mask = is_read[:, None] & has_element[None, :]
            k = tl.load(keys + key_places[:, None] + elements[None, :], mask=mask, other=0.0)
            v = tl.load(values + key_places[:, None] + elements[None, :], mask=mask, other=0.0)
            if IS_FLOAT32:
                scores = tl.dot(q, tl.trans(k), input_precision="tf32x3")
            else:
                scores = tl.dot(q, tl.trans(k))
            is_before = positions[None, :] < firsts[:, None]
            is_hidden = is_before | (positions[None, :] >= stops[:, None])
            scores = tl.where(is_hidden, float("-inf"), scores * scaling)
            higher = tl.maximum(highest, tl.max(scores, 1))
            # A row that has seen nothing yet has no highest score to be measured by.
            base = tl.where(higher == float("-inf"), 0.0, higher)
            share = tl.exp(highest - base)
            weights = tl.exp(scores - base[:, None])
            total = total * share + tl.sum(weights, 1)
            if IS_FLOAT32:
                more = tl.dot(weights, v, input_precision="tf32x3")
            else:
                more = tl.dot(weights.to(v.dtype), v)
            result = result * share[:, None] + more
            highest = higher
        split += NUM_PARTS

    num_heads = NUM_KV_HEADS * NUM_GROUPS
    at = (part * num_tokens + first_row + tokens).to(tl.int64) * num_heads + heads
    tl.store(
        parts + at[:, None] * HEAD_DIM + elements[None, :],
        result,
        mask=has_row[:, None] & has_element[None, :],
    )
    tl.store(states + 2 * at, highest, mask=has_row)
    tl.store(states + 2 * at + 1, total, mask=has_row)


@triton.jit
def join_parts(
    parts,
    states,
    output,  # [num_tokens, num_heads, head_dim]
    spans,
    num_spans,
    num_tokens,
    num_heads,
    NUM_PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_ELEMENTS: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """The result of one token and head, its parts put together in order."""
    token, head = tl.program_id(0), tl.program_id(1)
    # The last span that begins at this row or before; behind its end are rows of nobody.
    low, high = 0, num_spans
    while low < high - 1:
        middle = (low + high) // 2
        is_behind = tl.load(spans + 4 * middle) > token
        low = tl.where(is_behind, low, middle)
        high = tl.where(is_behind, middle, high)
    elements = tl.arange(0, NUM_ELEMENTS)
    has_element = elements < HEAD_DIM
    place = (token.to(tl.int64) * num_heads + head) * HEAD_DIM + elements
    span = spans + 4 * low
    if token >= tl.load(span) + tl.load(span + 1):
        tl.store(output + place, tl.zeros([NUM_ELEMENTS], tl.float32), mask=has_element)
        return
    # The splits that the row sees, of which a part has every `NUM_PARTS`th.
    num_queries, stop = tl.load(span + 1), tl.load(span + 2)
    reach = WINDOW + 1
    if CAUSAL:
        stop += token - tl.load(span) - num_queries + 1
        reach = WINDOW
    first_split = 0
    if WINDOW > 0:
        first_split = tl.maximum(0, stop - reach) // SPLIT
    num_splits = tl.cdiv(stop, SPLIT) - first_split
    highest = float("-inf")
    total = 0.0
    result = tl.zeros([NUM_ELEMENTS], tl.float32)
    for part in range(NUM_PARTS):
        has_part = num_splits > (part - first_split % NUM_PARTS + NUM_PARTS) % NUM_PARTS
        at = (part * num_tokens + token).to(tl.int64) * num_heads + head
        of_part = tl.where(has_part, tl.load(states + 2 * at), float("-inf"))
        higher = tl.maximum(highest, of_part)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        share, share_of_part = tl.exp(highest - base), tl.exp(of_part - base)
        total_of_part = tl.where(has_part, tl.load(states + 2 * at + 1), 0.0)
        total = total * share + total_of_part * share_of_part
        is_read = elements < tl.where(has_part, HEAD_DIM, 0)
        more = tl.load(parts + at * HEAD_DIM + elements, mask=is_read, other=0.0)
        result = result * share + more * share_of_part
        highest = higher
    tl.store(output + place, result / total, mask=has_element)


@triton.jit(do_not_specialize=["num_inner"])
def rms_norm(
    rows,  # [num_outer, num_inner, DIM], with strides
    output,  # [num_outer, num_inner, DIM]
    gain,  # [DIM], float32, or None for ones
    residual,  # [num_outer, num_inner, DIM], or None
    eps,
    num_inner,
    outer_stride,
    inner_stride,
    DIM: tl.constexpr,
    NUM_ELEMENTS: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """One row, and a residual; with `ROUNDS` the quotient is rounded before it is multiplied."""
    elements = tl.arange(0, NUM_ELEMENTS)
    has_element = elements < DIM
    number = tl.program_id(0).to(tl.int64)
    place = number // num_inner * outer_stride + number % num_inner * inner_stride
    row = tl.load(rows + place + elements, mask=has_element, other=0.0)
    values = row.to(tl.float32)
    result = values * tl.rsqrt(tl.sum(values * values, 0) / DIM + eps)
    if ROUNDS:
        result = result.to(row.dtype).to(tl.float32)
    if gain is not None:
        result *= tl.load(gain + elements, mask=has_element, other=0.0)
    if residual is not None:
        more = tl.load(residual + number * DIM + elements, mask=has_element, other=0.0)
        result = result.to(row.dtype).to(tl.float32) + more.to(tl.float32)
    tl.store(output + number * DIM + elements, result.to(row.dtype), mask=has_element)


@triton.jit
def rotate(
    query,  # [num_tokens, num_heads, HEAD_DIM], with strides
    key,  # the same of its own heads, or None
    cos,  # [num_tokens, HEAD_DIM], with a stride
    sin,
    query_output,  # [num_tokens, num_heads, HEAD_DIM]
    key_output,
    query_gain,  # [HEAD_DIM], float32, or None for ones: of the norm that comes before
    key_gain,
    eps,
    num_heads,
    num_key_heads,
    query_token_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    cos_stride,
    sin_stride,
    HEAD_DIM: tl.constexpr,
    NUM_ELEMENTS: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    IS_NORMED: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """A few heads of a token, normed first if need be: tiles of the query's come first."""
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    elements = tl.arange(0, NUM_ELEMENTS)
    has_element = elements < HEAD_DIM
    is_first = elements < HEAD_DIM // 2
    others = tl.where(is_first, elements + HEAD_DIM // 2, elements - HEAD_DIM // 2)
    c = tl.load(cos + token * cos_stride + elements, mask=has_element, other=0.0)
    s = tl.load(sin + token * sin_stride + elements, mask=has_element, other=0.0)
    source, target, gain = query + token * query_token_stride, query_output, query_gain
    count, stride = num_heads, query_head_stride
    if key is not None:
        num_tiles = tl.cdiv(num_heads, TILE_HEADS)
        if tile >= num_tiles:
            source, target, gain = key + token * key_token_stride, key_output, key_gain
            count, stride = num_key_heads, key_head_stride
            tile -= num_tiles
    heads = tile * TILE_HEADS + tl.arange(0, TILE_HEADS)
    mask = (heads < count)[:, None] & has_element[None, :]
    source += heads[:, None] * stride
    loaded = tl.load(source + elements[None, :], mask=mask, other=0.0)
    x = loaded.to(tl.float32)
    other = tl.load(source + others[None, :], mask=mask, other=0.0).to(tl.float32)
    if IS_NORMED:
        scale = tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)[:, None]
        x, other = x * scale, other * scale
        if ROUNDS:
            x, other = x.to(loaded.dtype).to(tl.float32), other.to(loaded.dtype).to(tl.float32)
        if query_gain is not None:
            x *= tl.load(gain + elements, mask=has_element, other=0.0)[None, :]
            other *= tl.load(gain + others, mask=has_element, other=0.0)[None, :]
        x, other = x.to(loaded.dtype).to(tl.float32), other.to(loaded.dtype).to(tl.float32)
    # Each product is rounded, as torch does.
    straight = (x * c.to(tl.float32)[None, :]).to(loaded.dtype).to(tl.float32)
    crossed = tl.where(is_first[None, :], -other, other) * s.to(tl.float32)[None, :]
    result = straight + crossed.to(loaded.dtype).to(tl.float32)
    place = (token * count + heads[:, None]) * HEAD_DIM + elements[None, :]
    tl.store(target + place, result.to(loaded.dtype), mask=mask)


@triton.jit
def gate(
    rows,  # [num_rows, SIZE], with a stride
    factors,  # the same: what the activated rows are multiplied by
    output,  # [num_rows, SIZE]
    row_stride,
    factor_stride,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    IS_GELU: tl.constexpr,
):
    """One tile of a row by SiLU, or by GELU as tanh approximates it."""
    row = tl.program_id(0).to(tl.int64)
    elements = tl.program_id(1) * TILE + tl.arange(0, TILE)
    has_element = elements < SIZE
    rounded = tl.load(rows + row * row_stride + elements, mask=has_element, other=0.0)
    factor = tl.load(factors + row * factor_stride + elements, mask=has_element, other=0.0)
    x = rounded.to(tl.float32)
    y = x
    if IS_GELU:
        # x * (1 + tanh(y)) / 2 is x * sigmoid(2 * y).
        y = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    shrunk = tl.exp(-tl.abs(y))
    result = x * tl.where(y < 0, shrunk, 1.0) / (1.0 + shrunk)
    result = result.to(rounded.dtype).to(tl.float32) * factor.to(tl.float32)
    tl.store(output + row * SIZE + elements, result.to(rounded.dtype), mask=has_element)


@triton.jit
def write_kv(
    key,  # [num_tokens, num_kv_heads, HEAD_DIM], with strides
    value,
    keys,  # [num_slots, num_kv_heads, HEAD_DIM]
    values,
    slots,  # [num_tokens], int64
    num_kv_heads,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    HEAD_DIM: tl.constexpr,
    NUM_ELEMENTS: tl.constexpr,
    TILE_HEADS: tl.constexpr,
):
    """Keys and values of a few heads of a token."""
    token = tl.program_id(0).to(tl.int64)
    heads = (tl.program_id(1) * TILE_HEADS + tl.arange(0, TILE_HEADS))[:, None]
    elements = tl.arange(0, NUM_ELEMENTS)[None, :]
    mask = (heads < num_kv_heads) & (elements < HEAD_DIM)
    target = (tl.load(slots + token) * num_kv_heads + heads) * HEAD_DIM + elements
    source = key + token * key_token_stride + heads * key_head_stride + elements
    tl.store(keys + target, tl.load(source, mask=mask), mask=mask)
    source = value + token * value_token_stride + heads * value_head_stride + elements
    tl.store(values + target, tl.load(source, mask=mask), mask=mask)
