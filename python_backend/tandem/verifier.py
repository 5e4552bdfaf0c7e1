"""The packed forward: one pass of the verifier over all tokens of a step."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tandem.attention import PackedBatch, Span
from tandem.head import OutputHead, likeliest_of
from tandem.kv_cache import KVCache
from tandem.sequence import ScheduledSequence


@dataclass(frozen=True)
class VerifierOutput:
    """One row for each token that can be sampled, in the order of the batch.

    A sequence whose pass reaches the end of its known tokens has `1 + len(draft_ids)` rows; any
    other has none.
    """

    hidden: Tensor  # [num_rows, hidden_size], what the output head reads: after the last norm
    head: OutputHead
    made_logits: Tensor | None  # [num_rows, vocab_size], if the head is not deferred

    def logits(self, rows: Items[int]) -> Tensor:
        """The logits of some rows, `[len(rows), vocab_size]`."""
        if self.made_logits is not None:
            return self.made_logits[list(rows)]
        return self.head.logits(self._hidden(rows))

    def likeliest(self, rows: Items[int]) -> Tensor:
        """The likeliest tokens in some rows, `[len(rows)]`; -1 where logits are no numbers."""
        if self.made_logits is not None:
            return likeliest_of(self.made_logits[list(rows)])
        return self.head.likeliest(self._hidden(rows))

    def _hidden(self, rows: Items[int]) -> Tensor:
        return self.hidden if len(rows) == len(self.hidden) else self.hidden[list(rows)]


class Verifier:
    """A transformers causal LM on the paged cache; its code and weights are unmodified.

    With `batch_invariant`, a token's logits depend to the last bit on nothing but the tokens before
    it, where the model's products have this property too.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head: OutputHead,
        cache: KVCache,
        *,
        batch_invariant: bool = False,
    ) -> None:
        self.model = model
        self.head = head
        self.cache = cache
        self._batch_invariant = batch_invariant

    def forward(self, batch: Items[ScheduledSequence]) -> VerifierOutput:
        """Runs the model over the batch's known tokens and drafts, and writes their K/V."""
        token_ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        spans = []
        for scheduled in batch:
            sequence = scheduled.sequence
            start = sequence.num_computed
            known = sequence.token_ids[start : start + scheduled.num_tokens]
            token_ids += known + scheduled.draft_ids
            stop = start + len(known) + len(scheduled.draft_ids)
            positions += range(start, stop)
            if scheduled.yields_token:
                rows += range(len(token_ids) - len(scheduled.draft_ids) - 1, len(token_ids))
            spans.append(Span(stop - start, stop, sequence.block_table))
        logits = packed_logits(
            self.model,
            self.cache,
            spans,
            token_ids,
            positions,
            rows,
            batch_invariant=self._batch_invariant,
        )
        assert self.head.states is not None
        hidden, self.head.states = self.head.states, None
        return VerifierOutput(hidden[0], self.head, None if self.head.is_deferred else logits)


def packed_logits(
    model: PreTrainedModel,
    cache: KVCache,
    spans: Items[Span],
    token_ids: list[int],
    positions: list[int],
    rows: list[int],
    *,
    batch_invariant: bool = False,
) -> Tensor:
    """One pass of a causal LM over a packed row, whose K/V it writes.

    Args:
        spans: how the row is divided among sequences.
        token_ids, positions: of the row.
        rows: the places in it behind which logits are wanted.
        batch_invariant: see `PackedBatch`.

    Returns:
        `[len(rows), vocab_size]`.
    """
    caller: Any = model
    packed = PackedBatch(
        spans, cache.block_size, model.dtype, model.device, batch_invariant=batch_invariant
    )
    logits: Tensor = caller(
        input_ids=torch.tensor([token_ids], device=model.device),
        position_ids=torch.tensor([positions], device=model.device),
        cache=cache.writer(packed.slots()),
        use_cache=True,
        logits_to_keep=torch.tensor(rows, dtype=torch.long, device=model.device),
        packed=packed,
    ).logits
    return logits[0]
