"""The packed pass: a causal LM over tokens of several sequences that lie in one row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tandem.cache.kv_cache import KVCache
from tandem.models.attention import PackedBatch


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
    caller: Any = model
    logits: Tensor = caller(
        input_ids=torch.tensor([token_ids], device=model.device),
        position_ids=torch.tensor([positions], device=model.device),
        cache=cache.writer(packed.slots()),
        use_cache=True,
        logits_to_keep=torch.tensor(rows, dtype=torch.long, device=model.device),
        packed=packed,
    ).logits
    return logits[0]
