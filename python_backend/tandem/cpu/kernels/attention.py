"""Attention of few queries over the block pool, in place; see `attention.c`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tandem.cpu.kernels.build import library

_LANES = 16
_MAX_GROUPS = 8


@dataclass(frozen=True)
class Queries:
    """The queries of a packed row that the kernel computes, and where their keys lie.

    Attributes:
        queries: `[num_queries, 4]`: row of the token, where its block table begins in `tables`,
            the first key that it sees, and the end of them.
        tables: blocks of all sequences, one sequence behind the other.
        max_keys: of one query.
    """

    queries: Tensor
    tables: Tensor
    block_size: int
    max_keys: int

    @classmethod
    def of(
        cls, queries: Items[tuple[int, int, int, int]], tables: Items[int], block_size: int
    ) -> Queries:
        """From plain numbers."""
        return cls(
            torch.tensor(queries, dtype=torch.int32),
            torch.tensor(tables, dtype=torch.int32),
            block_size,
            max(stop - first for _, _, first, stop in queries),
        )


class AttentionKernel:
    """Attention of a packed row's queries over the block pool, in place."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._run = library.paged_attention
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._run.argtypes = [
            *(pointer, size, size),
            *(pointer, pointer, pointer),
            *(pointer, pointer, number, number),
            *(number, number, number, ctypes.c_float, pointer),
            *(size, size, number),
        ]
        self._run.restype = None

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        output: Tensor,
        queries: Queries,
        scaling: float,
    ) -> None:
        """Computes the rows of `output` that belong to `queries`.

        Args:
            query: `[num_heads, num_tokens, head_dim]`.
            keys, values: the pool, `[num_slots, num_kv_heads, head_dim]`, contiguous.
            output: `[num_tokens, num_heads, head_dim]`, contiguous.
        """
        num_heads, _, head_dim = query.shape
        assert query.stride(2) == 1
        assert keys.is_contiguous()
        assert values.is_contiguous()
        assert output.is_contiguous()
        num_threads = torch.get_num_threads()
        row = -(-queries.max_keys // _LANES) * _LANES
        own = _MAX_GROUPS * (row + -(-head_dim // _LANES) * _LANES)
        scratch = torch.empty(num_threads * own, dtype=torch.float32)
        self._run(
            *(query.data_ptr(), query.stride(0), query.stride(1)),
            *(keys.data_ptr(), values.data_ptr(), output.data_ptr()),
            *(queries.tables.data_ptr(), queries.queries.data_ptr(), len(queries.queries)),
            *(num_heads, keys.shape[1], head_dim, queries.block_size, scaling, scratch.data_ptr()),
            *(own, row, num_threads),
        )


@cache
def attention_kernel(device: torch.device, dtype: torch.dtype) -> AttentionKernel | None:
    """The kernel for a device and type, or None if there is none."""
    found = library(device, dtype)
    return None if found is None else AttentionKernel(found)
