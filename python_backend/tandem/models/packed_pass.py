"""The packed pass: a causal LM over tokens of several sequences that lie in one row."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tandem.cache.kv_cache import KVCache
from tandem.models.attention import Packed, PackedBatch


def packed_logits(
    model: PreTrainedModel,
    cache: KVCache,
    packed: PackedBatch,
    token_ids: list[int],
    positions: list[int],
    rows: list[int],
) -> Tensor:
    """One pass of a causal LM over a packed row, whose K/V it writes.

    Args:
        packed: how the row is divided among sequences.
        token_ids, positions: of the row.
        rows: the places in it behind which logits are wanted.

    Returns:
        `[len(rows), vocab_size]`.
    """
    return row_logits(
        model,
        cache,
        packed,
        packed.slots(),
        torch.tensor([token_ids], device=model.device),
        torch.tensor([positions], device=model.device),
        torch.tensor(rows, dtype=torch.long, device=model.device),
    )


def row_logits(
    model: PreTrainedModel,
    cache: KVCache,
    packed: Packed,
    slots: Items[Tensor],
    token_ids: Tensor,
    positions: Tensor,
    rows: Tensor,
) -> Tensor:
    """The same of tensors alone, `token_ids` and `positions` `[1, num_tokens]`.

    Args:
        slots: of the row in each group of layers, `[num_tokens]`.
    """
    caller: Any = model
    logits: Tensor = caller(
        input_ids=token_ids,
        position_ids=positions,
        cache=cache.writer(slots),
        use_cache=True,
        logits_to_keep=rows,
        packed=packed,
    ).logits
    return logits[0]
