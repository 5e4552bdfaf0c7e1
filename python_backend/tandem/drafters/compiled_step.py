"""An assistant's step as a graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tandem.cache.kv_cache import KVCache
from tandem.drafters.assistant import Assistant, SharedKV
from tandem.models.attention import PackedBatch, Span
from tandem.wing import Compiler, wing_of


class _Step(nn.Module):
    """One guess further, of tensors alone."""

    def __init__(self, assistant: Assistant, compiler: Compiler) -> None:
        super().__init__()
        self.assistant = assistant
        self._compiler = compiler
        # The assistant doesn't own it; whoever makes a graph has to find it.
        self.embed = assistant.embed

    def extra_repr(self) -> str:
        """What a graph of it depends on besides its parts."""
        return self._compiler.describe()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The next state, `[1, n, hidden_size]`, and logits over the draft vocabulary."""
        token_ids, hidden, positions, *spans, tables = inputs
        config = self.assistant.config
        assert self.assistant.head is not None
        state = self.assistant(
            token_ids,
            hidden,
            positions,
            self._compiler.reader(config.source_layers),
            packed=self._compiler.batch(spans, tables, causal=False),
        )
        return state, self.assistant.head(state)


class CompiledStep:
    """An assistant's step with its head."""

    def __init__(
        self, assistant: Assistant, shared: SharedKV, cache: KVCache, compiler: Compiler
    ) -> None:
        """Makes the graph and compares it with the assistant.

        Args:
            shared: the verifier's K/V, which lie in `cache`.
            compiler: with the assistant's weights and the cache.

        Raises:
            UnsupportedModelError: the graph computes something else.
        """
        length = cache.block_size + 1
        packed = PackedBatch(
            [Span(1, length, tables) for tables in compiler.example_tables],
            cache.block_size,
            assistant.dtype,
            assistant.device,
            windows=cache.windows,
            causal=False,
        )
        width = assistant.config.get_text_config().hidden_size
        token_ids, positions = torch.tensor([[1, 2, 3]]), torch.full((1, 3), length)
        hidden = torch.linspace(-1, 1, 3 * width).view(1, 3, width).to(assistant.dtype)
        expected = assistant(token_ids, hidden, positions, shared, packed=packed)
        assert assistant.head is not None
        inputs = [token_ids, hidden, positions, *_flat(packed)]
        self._graph = compiler.graph(_Step(assistant, compiler), inputs)
        state, logits = self._graph(*inputs)
        compiler.check(state, expected)
        compiler.check(logits, assistant.head(expected))

    def __call__(
        self, token_ids: Tensor, hidden: Tensor, positions: Tensor, packed: PackedBatch
    ) -> tuple[Tensor, Tensor]:
        """The next state and logits over the draft vocabulary; see `Assistant.forward`."""
        state, logits = self._graph(token_ids, hidden, positions, *_flat(packed))
        return state, logits


def _flat(packed: PackedBatch) -> list[Tensor]:
    spans, tables = packed.spans()
    return [*spans, tables]


def compile_step(assistant: Assistant, shared: SharedKV, cache: KVCache) -> CompiledStep | None:
    """Compiles an assistant's step; None where that can't be done."""
    return wing_of(assistant.device).compiled(
        lambda compiler: CompiledStep(assistant, shared, cache, compiler), assistant, cache
    )
