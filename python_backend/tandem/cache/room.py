"""How much memory a KV cache takes, and how many tokens find room in some."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence as Items

import torch

from tandem.cache.kv_cache import LayerShape
from tandem.cache.layer_groups import LayerGroup, group_of, plan_groups, windows_of
from tandem.config import EngineConfig
from tandem.errors import ConfigError


class CacheRoom:
    """What a cache for so many tokens of context takes."""

    def __init__(
        self,
        shapes: Items[LayerShape],
        max_model_len: int,
        dtype: torch.dtype,
        config: EngineConfig,
    ) -> None:
        """Takes what all models store, and how many sequences of which length there may be."""
        self._config = config
        self._max_model_len = max_model_len
        self._windows = windows_of((shape.window for shape in shapes), max_model_len)
        # Of one token, in each group.
        self._bytes = [0] * len(self._windows)
        self._num_layers = [0] * len(self._windows)
        for shape in shapes:
            group = group_of(self._windows, shape.window)
            self._bytes[group] += shape.elements_per_token * dtype.itemsize
            self._num_layers[group] += 1

    @property
    def least(self) -> int:
        """Tokens for one sequence, which may leave its last block partly empty."""
        size = self._config.block_size
        return -(-self._max_model_len // size) * size

    def check(self, num_tokens: int) -> None:
        """Refuses a cache that has no room for one sequence.

        Raises:
            ConfigError: it hasn't.
        """
        if num_tokens >= self._max_model_len:
            return
        given = self._config.kv_cache_tokens is not None
        raise ConfigError(
            f"the KV cache holds {num_tokens} tokens, fewer than one sequence of max_model_len "
            f"{self._max_model_len}: "
            + ("raise kv_cache_tokens" if given else "raise gpu_memory_utilization on a GPU")
            + " or lower max_model_len"
        )

    def groups(self, num_tokens: int) -> list[LayerGroup]:
        """How the groups share a cache for so many tokens."""
        config = self._config
        return plan_groups(
            self._windows,
            num_tokens,
            config.block_size,
            self._max_model_len,
            config.max_num_seqs,
            config.max_num_batched_tokens,
        )

    def num_bytes(self, num_tokens: int) -> int:
        """Bytes of a cache for so many tokens."""
        groups = zip(self.groups(num_tokens), self._bytes, strict=True)
        return sum(group.num_blocks * each for group, each in groups) * self._config.block_size

    def num_tokens(self, num_bytes: int) -> int:
        """The most tokens, in whole blocks, for which so many bytes are enough."""
        size = self._config.block_size
        # Beyond some length a window group takes no more, so a group without one bounds it.
        kept = sum(b for b, w in zip(self._bytes, self._windows, strict=True) if w is None)
        most = num_bytes // (kept or sum(self._bytes)) // size
        counts = range(most + 1)
        return (bisect_right(counts, num_bytes, key=lambda n: self.num_bytes(n * size)) - 1) * size

    def describe(self, num_tokens: int) -> str:
        """Sizes for the log."""
        parts = [
            f"{group.name}: {num_layers} layers, {group.num_blocks} blocks, {each} bytes a token"
            for group, num_layers, each in zip(
                self.groups(num_tokens), self._num_layers, self._bytes, strict=True
            )
        ]
        size = self.num_bytes(num_tokens) / 2**20
        said = f"{num_tokens} tokens, {size:.1f} MiB ({'; '.join(parts)})"
        if any(window is not None for window in self._windows):
            said += f"; without windows {num_tokens * sum(self._bytes) / 2**20:.1f} MiB"
        return said
