"""One pass of the verifier over all tokens of a step."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from tandem.cache.kv_cache import KVCache
from tandem.models.attention import PackedBatch, Span
from tandem.models.compiled_pass import CompiledPass
from tandem.models.head import OutputHead, likeliest_of, take_states
from tandem.models.packed_pass import packed_logits
from tandem.requests.sequence import ScheduledSequence


@dataclass(frozen=True)
class VerifierOutput:
    """One row for each token that can be sampled, in the order of the batch; then scored rows.

    A sequence whose pass reaches the end of its known tokens has `1 + len(draft_ids)` rows; any
    other has none. Behind `num_sampled` are those behind which a token of a prompt is scored.
    """

    hidden: Tensor  # [num_rows, hidden_size], what the output head reads: after the last norm
    head: OutputHead
    made_logits: Tensor | None  # [num_rows, vocab_size], if the head is not deferred
    num_sampled: int

    def logits(self, rows: Items[int]) -> Tensor:
        """The logits of some rows, `[len(rows), vocab_size]`."""
        if self.made_logits is not None:
            return self.made_logits[list(rows)]
        return self.head.logits(self._hidden(rows))

    def likeliest(self, rows: Items[int]) -> list[int]:
        """The likeliest tokens in some rows; -1 where logits are no numbers."""
        if self.made_logits is not None:
            return likeliest_of(self.made_logits[list(rows)])
        return self.head.likeliest(self._hidden(rows))

    def _hidden(self, rows: Items[int]) -> Tensor:
        return self.hidden if len(rows) == len(self.hidden) else self.hidden[list(rows)]


class Verifier:
    """A transformers causal LM on the paged cache; its code and weights are unmodified."""

    def __init__(
        self,
        model: PreTrainedModel,
        head: OutputHead,
        cache: KVCache,
        compiled: CompiledPass | None = None,
    ) -> None:
        """Takes a loaded model.

        Args:
            compiled: its pass as a graph, if there is one.
        """
        self.model = model
        self.head = head
        self.cache = cache
        self.compiled = compiled
        # The model looks for them among its parameters each time.
        self._dtype, self._device = model.dtype, model.device

    def forward(self, batch: Items[ScheduledSequence]) -> VerifierOutput:
        """Runs the model over the batch's known tokens and drafts, and writes their K/V."""
        token_ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        scored: list[int] = []
        spans = []
        for scheduled in batch:
            sequence = scheduled.sequence
            start = sequence.num_computed
            known = sequence.token_ids[start : start + scheduled.num_tokens]
            scored += [len(token_ids) + row for row in scheduled.scored_rows]
            token_ids += known + scheduled.draft_ids
            stop = start + len(known) + len(scheduled.draft_ids)
            positions += range(start, stop)
            if scheduled.yields_token:
                rows += range(len(token_ids) - len(scheduled.draft_ids) - 1, len(token_ids))
            spans.append(Span(stop - start, stop, sequence.block_tables))
        packed = PackedBatch(
            spans, self.cache.block_size, self._dtype, self._device, windows=self.cache.windows
        )
        if self.compiled is not None:
            states = self.compiled(packed, token_ids, positions, rows + scored)
            return VerifierOutput(states, self.head, None, len(rows))
        logits = packed_logits(self.model, self.cache, packed, token_ids, positions, rows + scored)
        states = take_states(self.model)[0]
        made = None if self.head.is_deferred else logits
        return VerifierOutput(states, self.head, made, len(rows))
