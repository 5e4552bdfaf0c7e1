"""An assistant's step as a graph."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch
from torch import Tensor, nn

from tandem.cache.kv_cache import CacheStandIn, KVCache
from tandem.cpu.graph import (
    EXAMPLE_TABLES,
    Graph,
    GraphBatch,
    check_compiled,
    try_to_compile,
)
from tandem.cpu.kernels import Operators
from tandem.drafters.assistant import Assistant, SharedKV
from tandem.models.attention import PackedBatch, Span


class _GraphKV(CacheStandIn):
    """Stands in for a `SharedKV` while a graph is made of a step."""

    def __init__(self, source_layers: Items[int]) -> None:
        self._source_layers = source_layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """What stands in the graph for the verifier's layer that this one reads."""
        layer = torch.full((), self._source_layers[layer_idx])
        return layer, layer


class _Step(nn.Module):
    """One guess further, of tensors alone."""

    def __init__(self, assistant: Assistant) -> None:
        super().__init__()
        self.assistant = assistant
        # The assistant doesn't own it; whoever makes a graph has to find it.
        self.embed = assistant.embed

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The next state, `[1, n, hidden_size]`, and logits over the draft vocabulary."""
        token_ids, hidden, positions, spans, tables = inputs
        config = self.assistant.config
        assert self.assistant.head is not None
        state = self.assistant(
            token_ids,
            hidden,
            positions,
            _GraphKV(config.source_layers),
            packed=GraphBatch(spans, tables, causal=False),
        )
        return state, self.assistant.head(state)


class CompiledStep:
    """An assistant's step with its head."""

    def __init__(
        self, assistant: Assistant, shared: SharedKV, cache: KVCache, operators: Operators
    ) -> None:
        """Makes the graph and compares it with the assistant.

        Args:
            shared: the verifier's K/V, which lie in `cache`.
            operators: with the assistant's weights and the cache.

        Raises:
            UnsupportedModelError: the graph computes something else.
        """
        length = cache.block_size + 1
        packed = PackedBatch(
            [Span(1, length, table) for table in EXAMPLE_TABLES],
            cache.block_size,
            assistant.dtype,
            assistant.device,
            causal=False,
        )
        width = assistant.config.get_text_config().hidden_size
        token_ids, positions = torch.tensor([[1, 2, 3]]), torch.full((1, 3), length)
        hidden = torch.linspace(-1, 1, 3 * width).view(1, 3, width).to(assistant.dtype)
        expected = assistant(token_ids, hidden, positions, shared, packed=packed)
        assert assistant.head is not None
        inputs = [token_ids, hidden, positions, *packed.spans()]
        self._graph = Graph(_Step(assistant), inputs, operators)
        state, logits = self._graph(*inputs)
        check_compiled(state, expected)
        check_compiled(logits, assistant.head(expected))

    def __call__(
        self, token_ids: Tensor, hidden: Tensor, positions: Tensor, packed: PackedBatch
    ) -> tuple[Tensor, Tensor]:
        """The next state and logits over the draft vocabulary; see `Assistant.forward`."""
        state, logits = self._graph(token_ids, hidden, positions, *packed.spans())
        return state, logits


def compile_step(assistant: Assistant, shared: SharedKV, cache: KVCache) -> CompiledStep | None:
    """Compiles an assistant's step; None where that can't be done."""
    return try_to_compile(
        lambda operators: CompiledStep(assistant, shared, cache, operators), assistant, cache
    )
