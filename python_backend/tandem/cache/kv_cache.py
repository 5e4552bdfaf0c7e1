"""The KV cache: one allocation on the verifier's device, read and written by block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerShape:
    """What one layer stores per token. `layer` is the index that the model's code uses."""

    layer: int
    num_kv_heads: int
    head_dim: int

    @property
    def elements_per_token(self) -> int:
        """Numbers in one token's K and V."""
        return 2 * self.num_kv_heads * self.head_dim


class KVCache:
    """K and V of every storing layer, for `num_blocks` blocks of `block_size` tokens.

    Slot `block * block_size + offset` of every layer belongs to the same token of the same
    sequence, so one block table serves all layers, whatever their shapes.
    """

    def __init__(
        self,
        shapes: Items[LayerShape],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_slots = num_blocks * block_size
        elements = sum(shape.elements_per_token for shape in shapes) * self.num_slots
        # Written, so that the memory is there: else it would be taken bit by bit in service.
        self._storage = torch.empty(elements, dtype=dtype, device=device).zero_()
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        offset = 0
        for shape in shapes:
            size = self.num_slots * shape.num_kv_heads * shape.head_dim
            keys, values = (
                self._storage[start : start + size].view(
                    self.num_slots, shape.num_kv_heads, shape.head_dim
                )
                for start in (offset, offset + size)
            )
            self._layers[shape.layer] = (keys, values)
            offset += 2 * size

    @property
    def num_bytes(self) -> int:
        """Size of the allocation."""
        return self._storage.numel() * self._storage.element_size()

    @property
    def layers(self) -> list[int]:
        """Those that store K/V of their own."""
        return list(self._layers)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer, each `[num_slots, num_kv_heads, head_dim]`: the pool itself."""
        return self._layers[index]

    def has_layer(self, index: int) -> bool:
        """Whether the layer stores K/V of its own."""
        return index in self._layers

    def writer(self, slots: Tensor) -> KVWriter:
        """What a model's `cache` argument takes for a pass that fills `slots`."""
        return KVWriter(self, slots)


class CacheStandIn(ABC):
    """Stands in for a transformers `Cache`: what `update` returns reaches the attention function.

    That is all of the interface that a pass over a packed row needs.
    """

    is_compileable = False

    @abstractmethod
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Takes `[1, num_kv_heads, num_tokens, head_dim]` K and V of one layer."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are passed explicitly; no model derives them from the cache."""
        return 0


class KVWriter(CacheStandIn):
    """The cache of one packed pass.

    A layer's `update` writes the pass's K/V to their slots and hands back the whole pool: that is
    what reaches the attention function as key and value. Layers that reuse another layer's K/V
    pass on what that layer got, so they read the right layer without any mapping here.
    """

    def __init__(self, cache: KVCache, slots: Tensor) -> None:
        self._cache = cache
        self._slots = slots  # [num_tokens]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Stores `[1, num_kv_heads, num_tokens, head_dim]` K and V of one layer."""
        keys, values = self._cache.layer(layer_idx)
        keys.index_copy_(0, self._slots, key_states[0].transpose(0, 1))
        values.index_copy_(0, self._slots, value_states[0].transpose(0, 1))
        return keys, values
