"""The paged attention in the Triton language against plain masked attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import triton_interpreter
from packed_rows import BLOCK_SIZE, SCALING, plain_attention, random_spans, slots_of
from tandem.cuda import attention
from tandem.cuda.attention import PagedAttention
from tandem.models.attention import PackedBatch, Span
from tandem.requests.sequence import BlockTable

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_BLOCKS = 200
LONGEST = 150
# In the interpreter a failure would be made smaller for minutes.
few = settings(max_examples=12, phases=[Phase.generate])


@pytest.fixture(autouse=True)
def _short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several splits for each part, at lengths that take no minutes."""
    triton_interpreter.mend(monkeypatch)
    monkeypatch.setattr(attention, "_SPLIT", 64)
    monkeypatch.setattr(attention, "_NUM_PARTS", 2)


def attend(
    query: Tensor,
    pool: Tensor,
    spans: list[Span],
    window: int | None,
    causal: bool = True,
    padding: int = 0,
) -> Tensor:
    """The kernel on `[num_tokens, num_heads, head_dim]`, with spans of nobody behind the others."""
    packed = PackedBatch(spans, BLOCK_SIZE, query.dtype, DEVICE, causal=causal)
    [described], tables = packed.spans()
    nobody = torch.tensor([[query.shape[0], 0, 0, 0]] * padding, dtype=torch.int32, device=DEVICE)
    described = torch.cat([described, nobody.view(-1, 4)])
    rows = torch.cat([query, query.new_full((padding, *query.shape[1:]), float("nan"))])
    output = PagedAttention()(
        rows.transpose(0, 1).unsqueeze(0),
        *pool,
        described,
        tables,
        BLOCK_SIZE,
        SCALING,
        window,
        causal=causal,
    )
    assert output.shape == (1, *rows.shape)
    assert not output[0, len(query) :].any()
    return output[0, : len(query)]


@few
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "behind"])
@given(
    data=st.data(),
    window=st.sampled_from([None, 1, 8, 70]),
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1), (6, 2), (8, 1)]),
    head_dim=st.sampled_from([16, 40, 64, 80]),
    padding=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_it_equals_plain_attention(
    causal: bool,
    dtype: torch.dtype,
    data: st.DataObject,
    window: int | None,
    heads: tuple[int, int],
    head_dim: int,
    padding: int,
    seed: int,
) -> None:
    """Slots of other sequences and free ones hold NaN: whoever reads them shows it."""
    num_heads, num_kv_heads = heads
    spans = random_spans(data, causal, True, NUM_BLOCKS, LONGEST)
    generator = torch.Generator().manual_seed(seed)
    shape = (2, NUM_BLOCKS * BLOCK_SIZE, num_kv_heads, head_dim)
    pool = torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)
    num_tokens = sum(span.num_queries for span in spans)
    query = torch.randn((num_tokens, num_heads, head_dim), generator=generator).to(DEVICE, dtype)
    expected, row = [], 0
    for span in spans:
        known = torch.randn((2, span.kv_len, num_kv_heads, head_dim), generator=generator)
        pool[:, slots_of(span)] = known = known.to(DEVICE, dtype)
        queries = query[row : row + span.num_queries].float()
        expected.append(plain_attention(queries, *known.float(), window, causal))
        row += span.num_queries
    output = attend(query, pool, spans, window, causal, padding)
    atol, rtol = (1e-5, 1e-4) if dtype == torch.float32 else (4e-2, 2e-2)
    torch.testing.assert_close(output.float(), torch.cat(expected), atol=atol, rtol=rtol)


@pytest.mark.parametrize("head_dim", [256, 512])
def test_large_heads(head_dim: int) -> None:
    """Those of Gemma: more keys than a tile has, and more queries."""
    torch.manual_seed(0)
    pool = torch.randn(2, 20 * BLOCK_SIZE, 1, head_dim, device=DEVICE)
    query = torch.randn(11, 8, head_dim, device=DEVICE) / 8
    blocks = torch.randperm(20).tolist()
    spans = [Span(10, 45, [BlockTable(blocks[:12])]), Span(1, 30, [BlockTable(blocks[12:])])]
    output = attend(query, pool, spans, 33)
    expected = [
        plain_attention(rows, *pool[:, slots_of(span)], 33, True)
        for rows, span in zip(query.split([10, 1]), spans, strict=True)
    ]
    torch.testing.assert_close(output, torch.cat(expected), atol=1e-4, rtol=1e-4)


@few
@given(data=st.data(), window=st.sampled_from([None, 70]), seed=st.integers(0, 99))
def test_a_query_alone_has_the_same_bits(
    data: st.DataObject, window: int | None, seed: int
) -> None:
    """Among others and in blocks that lie anywhere, or alone in blocks in order."""
    spans = random_spans(data, True, True, NUM_BLOCKS, LONGEST)
    generator = torch.Generator().manual_seed(seed)
    pool = torch.full((2, NUM_BLOCKS * BLOCK_SIZE, 2, 32), float("nan"), dtype=torch.bfloat16)
    pool = pool.to(DEVICE)
    num_tokens = sum(span.num_queries for span in spans)
    query = torch.randn((num_tokens, 8, 32), generator=generator).to(DEVICE, torch.bfloat16)
    own: list[Any] = []
    for span in spans:
        known = torch.randn((2, span.kv_len, 2, 32), generator=generator)
        pool[:, slots_of(span)] = known = known.to(DEVICE, torch.bfloat16)
        own.append(known)
    together = attend(query, pool, spans, window)
    row = 0
    for span, known in zip(spans, own, strict=True):
        last = span.num_queries - 1
        blocks = BlockTable(list(range(-(-span.kv_len // BLOCK_SIZE))))
        alone = attend(
            query[row + last : row + last + 1], known, [Span(1, span.kv_len, [blocks])], window
        )
        assert torch.equal(alone[0], together[row + last])
        row += span.num_queries
