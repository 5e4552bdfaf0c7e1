"""Packed rows over a pool, and plain attention to compare with."""

from __future__ import annotations

import random

import torch
from hypothesis import strategies as st
from torch import Tensor

from tandem.models.attention import Span
from tandem.requests.sequence import BlockTable

BLOCK_SIZE, NUM_BLOCKS = 4, 40
SCALING = 0.3


def plain_attention(
    query: Tensor, keys: Tensor, values: Tensor, window: int | None, causal: bool
) -> Tensor:
    """One sequence, one softmax over visible positions for each query; all heads repeated.

    Shapes: query `[num_queries, num_heads, head_dim]`,
    keys, values `[kv_len, num_kv_heads, head_dim]`.
    """
    num_queries, num_heads, _ = query.shape
    kv_len, num_kv_heads, _ = keys.shape
    groups = num_heads // num_kv_heads
    output = torch.empty_like(query)
    for index in range(num_queries):
        # A drafter's query stands behind the last key, and its window includes both ends.
        position = kv_len - num_queries + index if causal else kv_len - 1
        last = position + 1
        first = 0
        if window is not None:
            first = max(0, position - window + 1) if causal else max(0, position - window)
        for head in range(num_heads):
            visible = keys[first:last, head // groups]
            weights = (visible @ query[index, head] * SCALING).softmax(dim=0)
            output[index, head] = weights @ values[first:last, head // groups]
    return output


def random_spans(
    data: st.DataObject,
    causal: bool,
    fragmented: bool,
    num_blocks: int = NUM_BLOCKS,
    longest: int = 20,
) -> list[Span]:
    """Up to 4 sequences, whose tokens lie in blocks of their own."""
    shapes = data.draw(
        st.lists(
            st.tuples(st.integers(1, 6) if causal else st.just(1), st.integers(0, longest)),
            min_size=1,
            max_size=4,
        ),
        label="(num_queries, earlier tokens)",
    )
    free = list(range(num_blocks))
    if fragmented:
        random.Random(data.draw(st.integers(0, 99), label="order of blocks")).shuffle(free)
    spans = []
    for num_queries, earlier in shapes:
        kv_len = num_queries + earlier
        needed = -(-kv_len // BLOCK_SIZE)
        table, free = free[:needed], free[needed:]
        spans.append(Span(num_queries, kv_len, [BlockTable(table)]))
    return spans


def slots_of(span: Span) -> list[int]:
    """Where the tokens of a span lie."""
    return [
        span.block_tables[0].blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        for position in range(span.kv_len)
    ]
