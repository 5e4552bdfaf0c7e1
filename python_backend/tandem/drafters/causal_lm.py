"""A small causal LM as the drafter: the classic pair.

Source: Leviathan, Kalman and Matias, "Fast inference from transformers via speculative decoding",
2023; here with the verifier's noise in place of a ratio test.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from tandem.cache.kv_cache import KVCache
from tandem.drafters.drafter import Drafter, DraftRequest, GoesOn, always
from tandem.models.attention import PackedBatch, Span
from tandem.models.packed_pass import packed_logits
from tandem.requests.sequence import Draft, ScheduledSequence, Sequence
from tandem.sampling.sample import Draw, guess


class _Part(NamedTuple):
    """Tokens of one sequence that a pass computes, from position `start`."""

    sequence: Sequence
    start: int
    token_ids: list[int]


class CausalLMDrafter(Drafter):
    """Drafts with a model that has the verifier's vocabulary.

    Its K/V lie in a cache of the verifier's geometry, so a sequence's block tables serve both. How
    many of a sequence's positions are valid is one number, which `observe` lowers to what was
    committed: that is the whole rollback. It begins with what the prefix cache had: blocks are
    shared only among sequences that this drafter drafts for, and only up to `num_cached`.
    """

    def __init__(self, model: PreTrainedModel, cache: KVCache) -> None:
        self._model = model
        self._cache = cache
        self._num_valid: dict[int, int] = {}

    def prefill(self, batch: Items[ScheduledSequence]) -> None:
        """Computes the same chunks of the prompts as the verifier's pass."""
        parts = []
        for scheduled in batch:
            sequence = scheduled.sequence
            start = self.num_cached(sequence)
            stop = sequence.num_computed + scheduled.num_tokens
            if start < stop:
                parts.append(_Part(sequence, start, sequence.token_ids[start:stop]))
        if parts:
            self._forward(parts)

    def propose(self, requests: Items[DraftRequest], goes_on: GoesOn = always) -> list[Draft]:
        """Guesses `num_tokens` tokens for each sequence, fewer if going on doesn't pay."""
        drafts = [Draft([], []) for _ in requests]
        for step in range(max(request.num_tokens for request in requests)):
            live = [i for i, request in enumerate(requests) if request.num_tokens > step]
            sequences = [requests[i].sequence for i in live]
            if step > 0 and not goes_on(sequences, [drafts[i].confidences for i in live]):
                break
            parts, draws = [], []
            for index, sequence in zip(live, sequences, strict=True):
                start = self.num_cached(sequence) if step == 0 else sequence.num_tokens + step - 1
                known = sequence.token_ids + drafts[index].token_ids
                parts.append(_Part(sequence, start, known[start:]))
                draws.append(Draw(sequence.params, sequence.seed, sequence.num_tokens + step))
            token_ids, confidences = guess(self._forward(parts), draws)
            for index, token_id, confidence in zip(
                live, token_ids.tolist(), confidences.tolist(), strict=True
            ):
                drafts[index].token_ids.append(token_id)
                drafts[index].confidences.append(confidence)
        return drafts

    def observe(self, sequence: Sequence, hidden: Tensor) -> None:
        """Gives up what was computed for drafts that have been rejected."""
        self._num_valid[sequence.id] = self.num_cached(sequence)

    def num_cached(self, sequence: Sequence) -> int:
        """Committed tokens of which the verifier and this model have the K/V."""
        num_valid = max(self._num_valid.get(sequence.id, 0), sequence.num_cached_tokens)
        # After a preemption the verifier starts anew, and so does the drafter.
        return min(num_valid, sequence.num_computed)

    def forget(self, sequence: Sequence) -> None:
        """Drops the sequence's length."""
        self._num_valid.pop(sequence.id, None)

    def _forward(self, parts: Items[_Part]) -> Tensor:
        """Logits behind the last token of each part, `[len(parts), vocab_size]`."""
        spans, rows = [], []
        token_ids: list[int] = []
        positions: list[int] = []
        for part in parts:
            stop = part.start + len(part.token_ids)
            spans.append(Span(len(part.token_ids), stop, part.sequence.block_tables))
            token_ids += part.token_ids
            positions += range(part.start, stop)
            rows.append(len(token_ids) - 1)
            self._num_valid[part.sequence.id] = stop
        packed = PackedBatch(
            spans,
            self._cache.block_size,
            self._model.dtype,
            self._model.device,
            windows=self._cache.windows,
        )
        return packed_logits(self._model, self._cache, packed, token_ids, positions, rows)
