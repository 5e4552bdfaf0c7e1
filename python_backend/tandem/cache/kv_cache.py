"""The KV cache: one allocation on the verifier's device, read and written by block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.cache.layer_groups import LayerGroup, group_of

# Writes K and V `[1, num_kv_heads, num_tokens, head_dim]` to slots of a layer's K and V.
WriteKV = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class LayerShape:
    """What one layer stores per token. `layer` is the index that the model's code uses.

    Its queries see the last `window` tokens, themselves included; all if None.
    """

    layer: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None

    @property
    def elements_per_token(self) -> int:
        """Numbers in one token's K and V."""
        return 2 * self.num_kv_heads * self.head_dim


class KVCache:
    """K and V of every storing layer, in blocks of `block_size` tokens.

    Slot `block * block_size + offset` of every layer of a group belongs to the same token of the
    same sequence, so one block table serves them all, whatever their shapes.

    Attributes:
        windows: of the groups; see `group_of`.
        write: writes a pass's K and V.
    """

    def __init__(
        self,
        shapes: Items[LayerShape],
        groups: Items[LayerGroup],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        has_scratch: bool = False,
        write: WriteKV | None = None,
    ) -> None:
        """Allocates it.

        Args:
            has_scratch: whether each group has one slot more, for rows that are nobody's.
            write: how a pass writes to it; by torch's operations if None.
        """
        self.write = write or _write
        self._shapes = shapes
        self._num_scratch = int(has_scratch)
        self.windows = [group.window for group in groups]
        self.block_size = block_size
        self._group_of_layer = {s.layer: group_of(self.windows, s.window) for s in shapes}
        self._storage = torch.empty(0, dtype=dtype, device=device)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.allocate(groups)

    def allocate(self, groups: Items[LayerGroup]) -> None:
        """Replaces the allocation, and loses what it holds.

        Args:
            groups: those there are, of other sizes.
        """
        self.groups = groups
        # Before there is another.
        self._layers.clear()
        self._storage = self._storage.new_empty(0)
        elements = sum(s.elements_per_token * self._num_slots(s.layer) for s in self._shapes)
        # Written, so that the memory is there: else it would be taken bit by bit in service.
        self._storage = self._storage.new_empty(elements).zero_()
        offset = 0
        for shape in self._shapes:
            num_slots = self._num_slots(shape.layer)
            size = num_slots * shape.num_kv_heads * shape.head_dim
            keys, values = (
                self._storage[start : start + size].view(
                    num_slots, shape.num_kv_heads, shape.head_dim
                )
                for start in (offset, offset + size)
            )
            self._layers[shape.layer] = (keys, values)
            offset += 2 * size

    def _num_slots(self, layer: int) -> int:
        group = self.groups[self._group_of_layer[layer]]
        return group.num_blocks * self.block_size + self._num_scratch

    @property
    def scratch_slots(self) -> list[int]:
        """In each group, the slot of nobody; only `has_scratch`."""
        assert self._num_scratch
        return [group.num_blocks * self.block_size for group in self.groups]

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

    def group_of_layer(self, index: int) -> int:
        """The group of a layer that stores K/V of its own."""
        return self._group_of_layer[index]

    def writer(self, slots: Items[Tensor]) -> KVWriter:
        """What a model's `cache` argument takes for a pass that fills `slots` of each group."""
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

    def __init__(self, cache: KVCache, slots: Items[Tensor]) -> None:
        self._cache = cache
        self._slots = slots  # of each group, [num_tokens]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Stores `[1, num_kv_heads, num_tokens, head_dim]` K and V of one layer."""
        keys, values = self._cache.layer(layer_idx)
        slots = self._slots[self._cache.group_of_layer(layer_idx)]
        self._cache.write(key_states, value_states, keys, values, slots)
        return keys, values


def _write(
    key_states: Tensor, value_states: Tensor, keys: Tensor, values: Tensor, slots: Tensor
) -> None:
    keys.index_copy_(0, slots, key_states[0].transpose(0, 1))
    values.index_copy_(0, slots, value_states[0].transpose(0, 1))
