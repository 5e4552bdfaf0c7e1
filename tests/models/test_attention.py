"""Attention over the block pool against plain masked attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from packed_rows import (
    BLOCK_SIZE,
    NUM_BLOCKS,
    SCALING,
    plain_attention,
    random_spans,
    slots_of,
)
from tandem.models.attention import PackedBatch, Span, paged_attention
from tandem.requests.sequence import BlockTable
from tiny_engines import DEVICE


def without_kernel(packed: PackedBatch) -> PackedBatch:
    packed.kernel = None
    return packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "torch"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "behind"])
@pytest.mark.parametrize("fragmented", [True, False], ids=["fragmented", "contiguous"])
@given(
    data=st.data(),
    window=st.sampled_from([None, 1, 3, 8]),
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1), (6, 2), (8, 1)]),
    head_dim=st.sampled_from([8, 16, 40, 72]),
    seed=st.integers(0, 99),
)
def test_paged_attention_equals_plain_attention(
    kernel: bool,
    causal: bool,
    fragmented: bool,
    dtype: torch.dtype,
    data: st.DataObject,
    window: int | None,
    heads: tuple[int, int],
    head_dim: int,
    seed: int,
) -> None:
    """Slots of other sequences and free ones hold NaN: whoever reads them shows it."""
    num_heads, num_kv_heads = heads
    spans = random_spans(data, causal, fragmented)
    generator = torch.Generator().manual_seed(seed)

    def random_tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    pool_shape = (NUM_BLOCKS * BLOCK_SIZE, num_kv_heads, head_dim)
    own = []
    pools = torch.full((2, *pool_shape), float("nan"), device=DEVICE, dtype=dtype)
    for span in spans:
        keys, values = (random_tensor(span.kv_len, num_kv_heads, head_dim) for _ in range(2))
        slots = slots_of(span)
        pools[0, slots], pools[1, slots] = keys, values
        own.append((keys, values))
    num_tokens = sum(span.num_queries for span in spans)
    query = random_tensor(num_tokens, num_heads, head_dim)
    packed = PackedBatch(spans, BLOCK_SIZE, dtype, torch.device(DEVICE), causal=causal)
    assert packed.kernel is not None or DEVICE != "cpu"
    if not kernel:
        without_kernel(packed)
    output, _ = paged_attention(
        torch.nn.Module(),
        query.transpose(0, 1).unsqueeze(0),
        pools[0],
        pools[1],
        None,
        packed=packed,
        scaling=SCALING,
        sliding_window=window,
    )
    parts = query.split([span.num_queries for span in spans])
    expected = torch.cat(
        [
            plain_attention(part.float(), keys.float(), values.float(), window, causal)
            for part, (keys, values) in zip(parts, own, strict=True)
        ]
    )
    assert output.shape == (1, num_tokens, num_heads, head_dim)
    atol, rtol = (1e-5, 1e-4) if dtype == torch.float32 else (4e-2, 2e-2)
    torch.testing.assert_close(output[0].float(), expected, atol=atol, rtol=rtol)


def test_slots_follow_the_block_table() -> None:
    """The queries' own slots: the last tokens of each span, across blocks out of order."""
    spans = [
        Span(3, 6, [BlockTable([5, 2])]),
        Span(1, 1, [BlockTable([0])]),
        Span(2, 9, [BlockTable([7, 3, 1])]),
    ]
    packed = PackedBatch(spans, BLOCK_SIZE, torch.float32, torch.device("cpu"))
    assert packed.slots()[0].tolist() == [23, 8, 9, 0, 15, 4]


def test_contiguous_blocks_are_read_as_one_run() -> None:
    """One slice of the pool, from the first visible token to the last, whatever the blocks."""
    span = Span(1, 14, [BlockTable([3, 4, 5, 6])])
    packed = without_kernel(PackedBatch([span], BLOCK_SIZE, torch.float32, torch.device("cpu")))
    assert packed.reads(None, 1)[0].slots == (slice(12, 26),)
    assert packed.reads(6, 1)[0].slots == (slice(20, 26),)
    fragmented = Span(1, 14, [BlockTable([3, 4, 8, 9])])
    packed = PackedBatch([fragmented], BLOCK_SIZE, torch.float32, torch.device("cpu"))
    without_kernel(packed)
    assert packed.reads(None, 1)[0].slots == (slice(12, 20), slice(32, 38))


@pytest.mark.skipif(DEVICE != "cpu", reason="the kernel is for CPUs")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@given(data=st.data(), window=st.sampled_from([None, 8]), seed=st.integers(0, 99))
def test_a_query_alone_has_the_same_bits(
    dtype: torch.dtype, data: st.DataObject, window: int | None, seed: int
) -> None:
    """Among others and in blocks that lie anywhere, or alone in blocks in order."""
    spans = random_spans(data, causal=True, fragmented=True)
    generator = torch.Generator().manual_seed(seed)
    pool = torch.full((2, NUM_BLOCKS * BLOCK_SIZE, 2, 32), float("nan"), dtype=dtype)
    query = torch.randn((sum(s.num_queries for s in spans), 8, 32), generator=generator).to(dtype)

    def attend(query: Tensor, pool: Tensor, spans: list[Span]) -> Tensor:
        packed = PackedBatch(spans, BLOCK_SIZE, dtype, torch.device("cpu"))
        rows = query.transpose(0, 1).unsqueeze(0)
        options = {"packed": packed, "scaling": SCALING, "sliding_window": window}
        return paged_attention(torch.nn.Module(), rows, *pool, None, **options)[0][0]

    own = []
    for span in spans:
        known = torch.randn((2, span.kv_len, 2, 32), generator=generator).to(dtype)
        pool[:, slots_of(span)] = known
        own.append(known)
    together = attend(query, pool, spans).split([span.num_queries for span in spans])
    for span, rows, part, known in zip(
        spans, together, query.split([span.num_queries for span in spans]), own, strict=True
    ):
        for index in range(span.num_queries):
            length = span.kv_len - span.num_queries + 1 + index
            blocks = list(range(-(-length // BLOCK_SIZE)))
            alone = attend(part[index : index + 1], known, [Span(1, length, [BlockTable(blocks)])])
            assert torch.equal(alone[0], rows[index])
