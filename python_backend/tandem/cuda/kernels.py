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

    highest = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    result = tl.zeros([TILE_ROWS, NUM_ELEMENTS], tl.float32)
    offsets = tl.arange(0, TILE_KEYS)
    # The first split of this part that is not before all that is seen.
    split = first // SPLIT
    split += (part - split % NUM_PARTS + NUM_PARTS) % NUM_PARTS
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
    highest = float("-inf")
    total = 0.0
    result = tl.zeros([NUM_ELEMENTS], tl.float32)
    for part in range(NUM_PARTS):
        at = (part * num_tokens + token).to(tl.int64) * num_heads + head
        of_part = tl.load(states + 2 * at)
        higher = tl.maximum(highest, of_part)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        share, share_of_part = tl.exp(highest - base), tl.exp(of_part - base)
        total = total * share + tl.load(states + 2 * at + 1) * share_of_part
        more = tl.load(parts + at * HEAD_DIM + elements, mask=has_element, other=0.0)
        result = result * share + more * share_of_part
        highest = higher
    tl.store(output + place, result / total, mask=has_element)


@triton.jit(do_not_specialize=["num_inner"])
def rms_norm(
    rows,  # [num_outer, num_inner, DIM], with strides
    output,  # [num_outer, num_inner, DIM]
    gain,  # [DIM], float32, or None for ones
    eps,
    num_inner,
    outer_stride,
    inner_stride,
    DIM: tl.constexpr,
    NUM_ELEMENTS: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """One row; with `ROUNDS` the quotient is rounded before it is multiplied."""
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
    tl.store(output + number * DIM + elements, result.to(row.dtype), mask=has_element)
