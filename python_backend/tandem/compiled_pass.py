"""The verifier's pass as a graph."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tandem.attention import PackedBatch, Span
from tandem.graph import Graph, GraphBatch, check_compiled, plan, try_to_compile
from tandem.kernels import Operators
from tandem.kernels.operators import write_kv
from tandem.kv_cache import KVCache
from tandem.packed_pass import packed_logits


class _GraphWriter:
    """Stands in for a `KVWriter` while a graph is made of a pass."""

    is_compileable = False

    def __init__(self, slots: Tensor) -> None:
        self._slots = slots

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Stores K and V, and gives what stands for the layer in the graph."""
        layer = write_kv(key_states, value_states, self._slots, layer_idx)
        return layer, layer

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are passed explicitly; no model derives them from the cache."""
        return 0


class _Pass(nn.Module):
    """What `packed_logits` does, of tensors alone."""

    def __init__(self, model: PreTrainedModel, windows: Items[int | None]) -> None:
        super().__init__()
        self.model = model
        self._windows = windows

    def extra_repr(self) -> str:
        """What the graph depends on beside the model."""
        return f"windows={self._windows}"

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the output head reads behind `rows`, `[1, num_rows, hidden_size]`."""
        token_ids, positions, rows, slots, tables, *queries = inputs
        states: Tensor = self.model(
            input_ids=token_ids,
            position_ids=positions,
            cache=_GraphWriter(slots),
            use_cache=True,
            logits_to_keep=rows,
            packed=GraphBatch(self._windows, tables, queries),
        ).logits
        return states


class CompiledPass:
    """The verifier's pass up to the output head, where all queries run on the kernel."""

    def __init__(self, model: PreTrainedModel, cache: KVCache, operators: Operators) -> None:
        """Makes the graph and compares it with the model.

        Args:
            model: its output head is deferred.
            operators: with the model's weights and the cache.

        Raises:
            UnsupportedModelError: the graph computes something else.
        """
        spans = [Span(2, 2, [block]) for block in range(3)]
        packed = PackedBatch(spans, cache.block_size, model.dtype, model.device)
        # Every number of things is another, so that none is taken for the same.
        token_ids, positions, rows = [5, 4, 3, 2, 1, 0], [0, 1] * 3, [0, 1, 3, 5]
        expected = packed_logits(model, cache, packed, token_ids, positions, rows)
        self._windows = packed.windows
        inputs = self._inputs(packed, token_ids, positions, rows)
        self._graph = Graph(_Pass(model, self._windows), inputs, operators)
        check_compiled(self(packed, token_ids, positions, rows), expected)

    def __call__(
        self, packed: PackedBatch, token_ids: list[int], positions: list[int], rows: list[int]
    ) -> Tensor:
        """What the output head reads behind `rows`, `[len(rows), hidden_size]`.

        Args:
            packed: runs on the kernel alone.
            token_ids, positions: of the packed row.
            rows: places in it.
        """
        # A graph wants at least one.
        (states,) = self._graph(*self._inputs(packed, token_ids, positions, rows or [0]))
        return states[0, : len(rows)]

    def _inputs(
        self, packed: PackedBatch, token_ids: list[int], positions: list[int], rows: list[int]
    ) -> list[Tensor]:
        return [
            torch.tensor([token_ids]),
            torch.tensor([positions]),
            torch.tensor(rows),
            packed.slots(),
            *plan(packed, self._windows),
        ]


def compile_pass(model: PreTrainedModel, cache: KVCache) -> CompiledPass | None:
    """Compiles the pass of a model whose output head is deferred; None where that can't be done."""
    return try_to_compile(lambda found: CompiledPass(model, cache, found), model, cache)
