"""Attention over the block pool, in place; see `attention.cpp`."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tandem.cpu.kernels.operators import load_operators

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class AttentionKernel(Protocol):
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
            spans, tables: see `PackedBatch.spans`.
            window, causal: see `PackedBatch`.

        Returns:
            `[1, num_tokens, num_heads, head_dim]`.
        """


def _paged_attention(
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
    attended: Tensor = torch.ops.tandem.paged_attention(
        query, keys, values, spans, tables, block_size, scaling, window or 0, causal
    )
    return attended


def attention_kernel(device: torch.device, dtype: torch.dtype) -> AttentionKernel | None:
    """The kernel for a device and type, or None if there is none."""
    if device.type != "cpu" or dtype not in _DTYPES or not load_operators():
        return None
    return _paged_attention
