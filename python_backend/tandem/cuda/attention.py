"""Attention over the block pool, on a GPU: two launches for a whole packed row.

Keys are read in tiles at multiples of their positions, and tiles are grouped into splits, also at
multiples of their positions: a long context is computed by several programs. Which program reads
which split, and in which order parts are put together, depends on positions alone. So the result of
a row depends, to the last bit, on nothing but its own keys. The number of programs depends on the
number of rows and of spans alone, not on how long they are: a captured graph serves any batch that
fits.

Sources: Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness",
2022; Dao et al., "Flash-Decoding for long-context inference", 2023.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from tandem.cuda.kernels import attend_parts, join_parts, write_kv

# Programs that share the keys of a query: split `s` is read by program `s % _NUM_PARTS`.
_NUM_PARTS = 8
# Keys of a split.
_SPLIT = 512
# Rows of queries that read keys together, one for each token and head, where there are so many.
_MIN_ROWS, _MAX_ROWS = 16, 32
_MAX_REGISTERS = 255
# Elements that a program rotates or writes, where one head has no more.
_TILE_ELEMENTS = 1024
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Tiles(NamedTuple):
    """How the kernel is cut for a shape.

    Attributes:
        num_tokens: of a tile of queries.
        num_rows: of a tile of queries, at least one for each of its tokens and heads.
        num_keys: of a tile of keys.
        num_elements: of a head, filled up to a power of 2.
        num_warps, num_stages: of a program.
    """

    num_tokens: int
    num_rows: int
    num_keys: int
    num_elements: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, num_groups: int, head_dim: int, dtype: torch.dtype) -> Tiles:
        """Depends on the model alone: the same for every batch.

        Args:
            num_groups: query heads that share a KV head.
        """
        is_wide = dtype == torch.float32  # its products take more registers
        num_rows = min(max(_MIN_ROWS, triton.next_power_of_2(8 * num_groups)), _MAX_ROWS)
        num_rows = max(_MIN_ROWS if is_wide else num_rows, triton.next_power_of_2(num_groups))
        num_elements = max(16, triton.next_power_of_2(head_dim))
        return cls(
            num_tokens=num_rows // num_groups,
            num_rows=num_rows,
            num_keys=16 if is_wide else 32 if num_elements > 128 else 64,
            num_elements=num_elements,
            num_warps=8 if is_wide or num_rows * num_elements >= 8192 else 4,
            num_stages=1 if is_wide else 3,
        )


class PagedAttention:
    """Attention of a packed row's queries over the block pool, in place."""

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        spans: Tensor,
        tables: Tensor,
        block_size: int,
        scaling: float,
        window: int | None,
        *,
        causal: bool,
    ) -> Tensor:
        """Attention of `[1, num_heads, num_tokens, head_dim]`.

        Args:
            keys, values: the pool, `[num_slots, num_kv_heads, head_dim]`, contiguous.
            spans, tables: see `PackedBatch.spans`. A span without queries costs nothing.
            window, causal: see `PackedBatch`.

        Returns:
            `[1, num_tokens, num_heads, head_dim]`.
        """
        _, num_heads, num_tokens, head_dim = query.shape
        num_kv_heads, num_spans = keys.shape[1], spans.shape[0]
        num_groups = num_heads // num_kv_heads
        assert query.stride(3) == 1
        assert keys.is_contiguous()
        assert values.is_contiguous()
        tiles = Tiles.of(num_groups, head_dim, query.dtype)
        output = query.new_empty(1, num_tokens, num_heads, head_dim)
        # Of each part: weighted values, and the highest score and the sum of weights.
        rows = (_NUM_PARTS, num_tokens, num_heads)
        parts = query.new_empty(*rows, head_dim, dtype=torch.float32)
        states = query.new_empty(*rows, 2, dtype=torch.float32)
        # Each span may end inside a tile.
        num_tiles = num_tokens // tiles.num_tokens + num_spans
        shape = {
            "NUM_PARTS": _NUM_PARTS,
            "HEAD_DIM": head_dim,
            "NUM_ELEMENTS": tiles.num_elements,
            "SPLIT": _SPLIT,
            # 0 stands for none.
            "WINDOW": 0 if window is None else window,
            "CAUSAL": causal,
        }
        attend_parts[(num_tiles, num_kv_heads, _NUM_PARTS)](
            query,
            keys,
            values,
            parts,
            states,
            spans,
            tables,
            num_spans,
            num_tokens,
            query.stride(1),
            query.stride(2),
            scaling,
            BLOCK_SIZE=block_size,
            NUM_GROUPS=num_groups,
            NUM_KV_HEADS=num_kv_heads,
            TILE_TOKENS=tiles.num_tokens,
            TILE_ROWS=tiles.num_rows,
            TILE_KEYS=tiles.num_keys,
            IS_FLOAT32=query.dtype == torch.float32,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            # Else the assembler spills a few to have more programs at once.
            maxnreg=_MAX_REGISTERS,
            **shape,
        )
        join_parts[(num_tokens, num_heads)](
            parts, states, output, spans, num_spans, num_tokens, num_heads, num_warps=4, **shape
        )
        return output


def paged_attention(dtype: torch.dtype) -> PagedAttention | None:
    """The kernel, for types that it multiplies."""
    return PagedAttention() if dtype in _DTYPES else None


def write_to_pool(
    key_states: Tensor, value_states: Tensor, keys: Tensor, values: Tensor, slots: Tensor
) -> None:
    """Writes K and V `[1, num_kv_heads, num_tokens, head_dim]` in one launch.

    Args:
        keys, values: a layer's pool, `[num_slots, num_kv_heads, head_dim]`, contiguous.
        slots: `[num_tokens]`.
    """
    _, num_kv_heads, num_tokens, head_dim = key_states.shape
    if key_states.stride(3) != 1 or value_states.stride(3) != 1:
        key_states, value_states = key_states.contiguous(), value_states.contiguous()
    num_elements, tile_heads = tile_of_heads(head_dim, num_kv_heads)
    write_kv[(num_tokens, triton.cdiv(num_kv_heads, tile_heads))](
        key_states,
        value_states,
        keys,
        values,
        slots,
        num_kv_heads,
        key_states.stride(2),
        key_states.stride(1),
        value_states.stride(2),
        value_states.stride(1),
        HEAD_DIM=head_dim,
        NUM_ELEMENTS=num_elements,
        TILE_HEADS=tile_heads,
        num_warps=4,
    )


def tile_of_heads(head_dim: int, num_heads: int) -> tuple[int, int]:
    """Elements of a head, filled up to a power of 2, and how many heads a program has."""
    num_elements = triton.next_power_of_2(head_dim)
    most = max(1, _TILE_ELEMENTS // num_elements)
    return num_elements, min(most, triton.next_power_of_2(num_heads))
