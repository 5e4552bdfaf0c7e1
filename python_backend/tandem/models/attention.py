"""Attention over the block pool, registered with transformers under the name `ATTENTION`.

All sequences of a pass lie in one row without padding. Each attends to its own slots of the pool.
Where the wing has a kernel that reads the blocks in place, one call computes them all. Where there
is none, matrix products do, sequence by sequence: in place where the blocks are contiguous, and
gathered where not.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

from tandem.cache.layer_groups import group_of
from tandem.errors import UnsupportedModelError
from tandem.requests.sequence import BlockTable
from tandem.wing import AttentionKernel, wing_of

ATTENTION = "tandem"
# What transformers passes for soft-capped scores and for attention sinks.
_UNSUPPORTED = ("softcap", "s_aux")


@dataclass(frozen=True)
class Span:
    """One sequence's part of a packed row: `num_queries` tokens that attend to `kv_len` tokens."""

    num_queries: int
    kv_len: int
    block_tables: Items[BlockTable]


@dataclass(frozen=True)
class _Read:
    """What queries of one span read in a layer: their slots, and a mask if some are hidden."""

    queries: slice
    slots: tuple[slice, ...]
    mask: Tensor | None  # [1, 1, num_groups * num_queries, num_keys]


class Packed(Protocol):
    """What a model passes on to the attention function."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """Attention over a layer's pool.

        Args:
            query: `[1, num_heads, num_tokens, head_dim]`.
            key, value: what the model's cache gave for the layer.
            window: how many tokens a query sees, itself included; all if None.

        Returns:
            `[1, num_tokens, num_heads, head_dim]`.
        """


class PackedBatch:
    """Describes a packed row to the attention function.

    With `causal`, a span's queries are the last of its `kv_len` tokens, whose K/V this pass
    writes. Without, the queries stand behind them and see all: that is how a drafter reads its
    verifier's cache. A layer reads by the block tables of its group, which its window tells; see
    `group_of`.
    """

    def __init__(
        self,
        spans: Items[Span],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        windows: Items[int | None] = (None,),
        causal: bool = True,
    ) -> None:
        self._spans = spans
        self._windows = windows
        self._block_size = block_size
        self._dtype = dtype
        self._device = device
        self._causal = causal
        self._wing = wing_of(device)
        self.kernel: AttentionKernel | None = self._wing.attention_kernel(dtype)
        self._described: tuple[list[Tensor], Tensor] | None = None
        self._reads: dict[tuple[int | None, int], list[_Read]] = {}

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """See `Packed`; key and value are the pool, `[num_slots, num_kv_heads, head_dim]`."""
        if self.kernel is not None:
            row = PackedRow(
                self.kernel,
                *self.spans(),
                self._block_size,
                self._windows,
                causal=self._causal,
            )
            return row.attend(query, key, value, scaling, window)
        _, num_heads, num_tokens, head_dim = query.shape
        num_kv_heads = key.shape[1]
        num_groups = num_heads // num_kv_heads
        output = query.new_empty(num_tokens, num_heads, head_dim)
        for read in self.reads(window, num_groups):
            # The query heads that share a KV head become rows of one product.
            grouped = query[:, :, read.queries].reshape(1, num_kv_heads, -1, head_dim)
            keys, values = _read(key, read.slots), _read(value, read.slots)
            attended = self._wing.attend(grouped, keys, values, read.mask, scaling)
            output[read.queries] = attended.view(num_heads, -1, head_dim).transpose(0, 1)
        return output.unsqueeze(0)

    def slots(self) -> list[Tensor]:
        """The slots of the queries' own K/V in each group, `[num_tokens]`."""
        size = self._block_size
        return [
            torch.tensor(
                [
                    span.block_tables[group].blocks[position // size] * size + position % size
                    for span in self._spans
                    for position in range(span.kv_len - span.num_queries, span.kv_len)
                ],
                device=self._device,
            )
            for group in range(len(self._windows))
        ]

    def spans(self) -> tuple[list[Tensor], Tensor]:
        """What a kernel or a compiled pass needs to know of the row.

        Returns:
            In each group, for each span, `[num_spans, 4]`: its first row, its number of queries,
            its `kv_len`, and where its block table begins; and the block tables of all groups, one
            behind the other. Of what was given back nothing is there, so a table may begin
            before them all.
        """
        if self._described is None:
            tables: list[int] = []
            groups = []
            for group in range(len(self._windows)):
                spans, row = [], 0
                for span in self._spans:
                    table = span.block_tables[group]
                    spans.append((row, span.num_queries, span.kv_len, len(tables) - table.start))
                    tables += table.blocks[table.start : -(-span.kv_len // self._block_size)]
                    row += span.num_queries
                groups.append(self._integers(spans))
            self._described = groups, self._integers(tables)
        return self._described

    def _integers(self, values: Items[object]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._device)

    def reads(self, window: int | None, num_groups: int) -> list[_Read]:
        """What the spans read without a kernel; worked out once for all such layers."""
        key = (window, num_groups)
        if key not in self._reads:
            start, reads = 0, []
            for span in self._spans:
                queries = slice(start, start + span.num_queries)
                earliest = span.kv_len - span.num_queries + 1 if self._causal else span.kv_len
                first = self._first_key(earliest, window)
                mask = self._mask(span, first, window, num_groups)
                table = span.block_tables[group_of(self._windows, window)]
                reads.append(_Read(queries, self._runs(table, first, span.kv_len), mask))
                start = queries.stop
            self._reads[key] = reads
        return self._reads[key]

    def _first_key(self, stop: int, window: int | None) -> int:
        """The first key of a query that may see those before `stop`."""
        if window is None:
            return 0
        # transformers' bidirectional window, which Gemma 4's assistants use, includes both ends.
        return max(0, stop - window if self._causal else stop - window - 1)

    def _runs(self, table: BlockTable, first: int, kv_len: int) -> tuple[slice, ...]:
        """The slots of tokens `first` to `kv_len`, as few contiguous runs as there are."""
        size = self._block_size
        runs: list[slice] = []
        for index in range(first // size, -(-kv_len // size)):
            base = table.blocks[index] * size
            start = base + max(0, first - index * size)
            stop = base + min(size, kv_len - index * size)
            if runs and runs[-1].stop == start:
                runs[-1] = slice(runs[-1].start, stop)
            else:
                runs.append(slice(start, stop))
        return tuple(runs)

    def _mask(self, span: Span, first: int, window: int | None, num_groups: int) -> Tensor | None:
        if not self._causal or span.num_queries == 1:
            return None
        keys = torch.arange(first, span.kv_len, device=self._device)
        queries = torch.arange(
            span.kv_len - span.num_queries, span.kv_len, device=self._device
        ).unsqueeze(1)
        hidden = keys > queries
        if window is not None:
            hidden |= keys <= queries - window
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(hidden, float("-inf")).repeat(num_groups, 1)[None, None]


class PackedRow:
    """A packed row that is described by tensors alone, for a wing with a kernel; see `Packed`."""

    def __init__(
        self,
        kernel: AttentionKernel,
        spans: Items[Tensor],
        tables: Tensor,
        block_size: int,
        windows: Items[int | None],
        *,
        causal: bool,
    ) -> None:
        """Takes what `PackedBatch.spans` gives, and the groups' windows."""
        self._kernel = kernel
        self._spans = spans
        self._tables = tables
        self._block_size = block_size
        self._windows = windows
        self._causal = causal

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """See `Packed`; key and value are the pool, `[num_slots, num_kv_heads, head_dim]`."""
        row = self._spans[group_of(self._windows, window)], self._tables, self._block_size
        return self._kernel(query, key, value, *row, scaling, window, causal=self._causal)


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Packed,
    scaling: float,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of a packed row over the pool, as transformers calls it.

    Returns:
        What `packed` attends to, and None in place of the weights.
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(f"the paged attention has no {name}, which this model uses")
    return packed.attend(query, key, value, scaling, sliding_window), None


def _read(pool: Tensor, slots: tuple[slice, ...]) -> Tensor:
    """`[1, num_kv_heads, num_keys, head_dim]`: a view of the pool if there is one run of slots."""
    rows = pool[slots[0]] if len(slots) == 1 else torch.cat([pool[run] for run in slots])
    return rows.transpose(0, 1).unsqueeze(0)


AttentionInterface.register(ATTENTION, paged_attention)
