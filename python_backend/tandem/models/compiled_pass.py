"""The verifier's pass as a graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tandem.cache.kv_cache import KVCache
from tandem.models.attention import PackedBatch, Span
from tandem.models.head import take_states
from tandem.models.packed_pass import packed_logits
from tandem.wing import Compiler, wing_of


class _Pass(nn.Module):
    """What `packed_logits` does, of tensors alone."""

    def __init__(self, model: PreTrainedModel, compiler: Compiler) -> None:
        super().__init__()
        self.model = model
        self._compiler = compiler

    def extra_repr(self) -> str:
        """What a graph of it depends on besides its parts."""
        return self._compiler.describe()

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the output head reads behind `rows`, `[num_rows, hidden_size]`."""
        token_ids, positions, rows, *groups, tables = inputs
        slots, spans = groups[: len(groups) // 2], groups[len(groups) // 2 :]
        self.model(
            input_ids=token_ids,
            position_ids=positions,
            cache=self._compiler.writer(slots),
            use_cache=True,
            logits_to_keep=rows,
            packed=self._compiler.batch(spans, tables),
        )
        return take_states(self.model)[0]


class CompiledPass:
    """The verifier's pass up to the output head."""

    def __init__(self, model: PreTrainedModel, cache: KVCache, compiler: Compiler) -> None:
        """Makes the graph and compares it with the model.

        Args:
            model: its output head is deferred.
            compiler: with the model's weights and the cache.

        Raises:
            UnsupportedModelError: the graph computes something else.
        """
        # Every size is another, so that none is taken for the same as one that happens to be equal.
        length = cache.block_size + 1
        spans = [
            Span(n, length, t) for n, t in zip((3, 2, 2), compiler.example_tables, strict=True)
        ]
        packed = PackedBatch(
            spans, cache.block_size, model.dtype, model.device, windows=cache.windows
        )
        positions = [p for s in spans for p in range(length - s.num_queries, length)]
        token_ids, rows = list(range(len(positions))), [0, 2, 3, 6]
        packed_logits(model, cache, packed, token_ids, positions, rows)
        expected = take_states(model)
        slots = packed.slots()
        pools = [(p, slots[cache.group_of_layer(n)]) for n in cache.layers for p in cache.layer(n)]
        written = [pool[own] for pool, own in pools]
        for pool, own in pools:
            pool[own] = torch.nan
        inputs = self._inputs(packed, token_ids, positions, rows)
        self._graph = compiler.graph(_Pass(model, compiler), inputs)
        compiler.check(self(packed, token_ids, positions, rows), expected[0])
        for (pool, own), states in zip(pools, written, strict=True):
            compiler.check(pool[own], states)

    def __call__(
        self, packed: PackedBatch, token_ids: list[int], positions: list[int], rows: list[int]
    ) -> Tensor:
        """What the output head reads behind `rows`, `[len(rows), hidden_size]`.

        Args:
            token_ids, positions: of the packed row.
            rows: places in it.
        """
        # A graph wants at least one.
        (states,) = self._graph(*self._inputs(packed, token_ids, positions, rows or [0]))
        return states if rows else states[:0]

    def _inputs(
        self, packed: PackedBatch, token_ids: list[int], positions: list[int], rows: list[int]
    ) -> list[Tensor]:
        row = torch.tensor([token_ids]), torch.tensor([positions]), torch.tensor(rows)
        spans, tables = packed.spans()
        return [*row, *packed.slots(), *spans, tables]


def compile_pass(model: PreTrainedModel, cache: KVCache) -> CompiledPass | None:
    """Compiles the pass of a model whose output head is deferred; None where that can't be done."""
    wing = wing_of(model.device)
    return wing.compiled(lambda compiler: CompiledPass(model, cache, compiler), model, cache)
