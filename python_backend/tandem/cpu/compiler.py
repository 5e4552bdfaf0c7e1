"""Compiles passes of a model that reads and writes one KV cache.

While a graph is made, stand-ins take the places of the packed row and of the cache: what a model's
layers do with them becomes operators of Tandem's own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tandem.cache.kv_cache import CacheStandIn, KVCache
from tandem.cache.layer_groups import group_of
from tandem.cpu.graph import Graph
from tandem.cpu.kernels import Operators, operators
from tandem.cpu.kernels.operators import attend, write_kv
from tandem.cpu.linear import Int8Linear, PackedLinear
from tandem.errors import UnsupportedModelError
from tandem.requests.sequence import BlockTable

logger = logging.getLogger("tandem")

# Results may differ from the model's own by rounding alone: by the root mean square, a share of it.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
_NUM_EXAMPLE_BLOCKS = 6
_MIN_BLOCK_SIZE = 2

T = TypeVar("T")


class Compiler:
    """Makes graphs of modules of one model.

    Attributes:
        example_tables: block tables of the three sequences in examples, for each group, each of a
            block and a token at least.
    """

    def __init__(self, operators: Operators, cache: KVCache) -> None:
        """Takes the operators with the model's weights, and the cache that they know."""
        self._operators = operators
        self._cache = cache
        self.example_tables = [
            [
                BlockTable([(block + number) % _NUM_EXAMPLE_BLOCKS for block in blocks])
                for number in range(len(cache.groups))
            ]
            for blocks in ((5, 0), (1, 4), (3, 2))
        ]

    def describe(self) -> str:
        """What a graph depends on besides the module."""
        groups = {layer: self._cache.group_of_layer(layer) for layer in self._cache.layers}
        return f"windows={self._cache.windows}, groups={groups}"

    def graph(self, module: nn.Module, inputs: Items[Tensor]) -> Graph:
        """See `Graph`."""
        return Graph(module, inputs, self._operators)

    def batch(self, spans: Items[Tensor], tables: Tensor, *, causal: bool = True) -> GraphBatch:
        """Stands in for a `PackedBatch`, whose `spans()` are inputs of the graph."""
        return GraphBatch(spans, tables, self._cache.windows, causal=causal)

    def writer(self, slots: Items[Tensor]) -> GraphWriter:
        """Stands in for what `KVCache.writer` gives for these slots."""
        return GraphWriter(slots, self._cache)

    def reader(self, source_layers: Items[int]) -> GraphReader:
        """Stands in for a cache that gives each layer the K/V of another model's layer."""
        return GraphReader(source_layers)

    def check(self, result: Tensor, expected: Tensor) -> None:
        """Compares what a graph and the model itself computed.

        Raises:
            UnsupportedModelError: they are not the same.
        """
        if result.shape != expected.shape:
            raise UnsupportedModelError(
                f"compiled, it gives a {tuple(result.shape)} instead of a {tuple(expected.shape)}"
            )
        difference = (result.float() - expected.float()).square().mean().sqrt().item()
        allowed = _TOLERANCE[result.dtype] * expected.float().square().mean().sqrt().item()
        if not difference <= allowed:
            raise UnsupportedModelError(
                f"compiled, it computes something else: results differ by {difference:.3g}, and "
                f"rounding explains {allowed:.3g}"
            )


class GraphBatch:
    """The packed row of a graph."""

    def __init__(
        self,
        spans: Items[Tensor],
        tables: Tensor,
        windows: Items[int | None],
        *,
        causal: bool = True,
    ) -> None:
        """Takes what `PackedBatch.spans` gave, as inputs of the graph."""
        self._spans, self._tables = spans, tables
        self._windows = windows
        self._causal = causal

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """As `PackedBatch.attend`; key is what stands for the layer in the graph."""
        spans = self._spans[group_of(self._windows, window)]
        return attend(query, key, spans, self._tables, scaling, window, causal=self._causal)


class GraphWriter(CacheStandIn):
    """The cache of a pass that writes, in a graph."""

    def __init__(self, slots: Items[Tensor], cache: KVCache) -> None:
        self._slots = slots
        self._cache = cache

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Stores K and V, and gives what stands for the layer in the graph."""
        slots = self._slots[self._cache.group_of_layer(layer_idx)]
        layer = write_kv(key_states, value_states, slots, layer_idx)
        return layer, layer


class GraphReader(CacheStandIn):
    """The cache of a pass that reads another model's K/V, in a graph."""

    def __init__(self, source_layers: Items[int]) -> None:
        self._source_layers = source_layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """What stands in the graph for the layer that this one reads."""
        layer = torch.full((), self._source_layers[layer_idx])
        return layer, layer


def try_to_compile(
    make: Callable[[Compiler], T], model: PreTrainedModel, cache: KVCache
) -> T | None:
    """What `make` makes of graphs, or None where the model can't be compiled.

    Args:
        make: gets the compiler with the model's weights and the pool.
    """
    found = operators(model.device, cache.block_size)
    if found is None:
        return None
    num_blocks = min(group.num_blocks for group in cache.groups)
    if num_blocks < _NUM_EXAMPLE_BLOCKS or cache.block_size < _MIN_BLOCK_SIZE:
        logger.info(
            "%s runs uncompiled: the cache has %d blocks of %d tokens, and %d of %d are needed",
            *(type(model).__name__, num_blocks, cache.block_size),
            *(_NUM_EXAMPLE_BLOCKS, _MIN_BLOCK_SIZE),
        )
        return None
    for module in model.modules():
        if isinstance(module, (PackedLinear, Int8Linear)):
            module.register(found)
    for layer in cache.layers:
        found.add_pool(layer, *cache.layer(layer))
    try:
        with torch.no_grad(), _example_kv(cache):
            return make(Compiler(found, cache))
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        logger.warning("%s runs uncompiled, which is slower: %s", type(model).__name__, said)
        logger.debug("why it can't be compiled", exc_info=True)
        return None


@contextmanager
def _example_kv(cache: KVCache) -> Iterator[None]:
    """Other K/V in every slot of the examples' sequences, and zeros again afterwards."""
    generator = torch.Generator().manual_seed(0)
    pools = [
        pool[: _NUM_EXAMPLE_BLOCKS * cache.block_size]
        for layer in cache.layers
        for pool in cache.layer(layer)
    ]
    try:
        for pool in pools:
            pool.normal_(generator=generator)
        yield
    finally:
        for pool in pools:
            pool.zero_()
