"""Lookup where a long match exists, a model everywhere else."""

from __future__ import annotations

from collections.abc import Sequence as Items

from torch import Tensor

from tandem.drafters.drafter import Drafter, DraftRequest, GoesOn, always
from tandem.drafters.ngram import NgramDrafter, copy
from tandem.requests.sequence import Draft, ScheduledSequence, Sequence

# A match of this many tokens is rarely chance; a model is better than shorter ones.
_MIN_MATCH = 5


class CombinedDrafter(Drafter):
    """`ngram+NAME`: both look at every sequence, and each round is one's or the other's."""

    def __init__(
        self, ngram: NgramDrafter, model: Drafter, num_ngram_tokens: int, num_model_tokens: int
    ) -> None:
        """Joins two drafters, each with the most tokens that it may guess in a round."""
        self._ngram = ngram
        self.model = model
        self._num_ngram_tokens = num_ngram_tokens
        self._num_model_tokens = num_model_tokens
        self.trained_length = model.trained_length

    def propose(self, requests: Items[DraftRequest], goes_on: GoesOn = always) -> list[Draft]:
        """What followed a long match, or the model's guesses."""
        drafts = [Draft([]) for _ in requests]
        left: list[tuple[int, DraftRequest]] = []
        for index, request in enumerate(requests):
            draft = self.look_up(request)
            if draft is not None:
                drafts[index] = draft
            else:
                left.append((index, self.for_model(request)))
        if left:
            guesses = self.model.propose([request for _, request in left], goes_on)
            for (index, _), guess in zip(left, guesses, strict=True):
                drafts[index] = guess
        return drafts

    def look_up(self, request: DraftRequest) -> Draft | None:
        """What followed a long match, if there is one."""
        match = self._ngram.find(request.sequence)
        if match is None or match.size < _MIN_MATCH:
            return None
        return copy(match, min(request.num_tokens, self._num_ngram_tokens))

    def for_model(self, request: DraftRequest) -> DraftRequest:
        """What the model is asked for where there is none."""
        return request._replace(num_tokens=min(request.num_tokens, self._num_model_tokens))

    def prefill(self, batch: Items[ScheduledSequence]) -> None:
        """The model may keep state of prompts."""
        self.model.prefill(batch)

    def observe(self, sequence: Sequence, hidden: Tensor) -> None:
        """The model may start from the verifier's state."""
        self.model.observe(sequence, hidden)

    def num_cached(self, sequence: Sequence) -> int:
        """The model's; lookup keeps no K/V."""
        return self.model.num_cached(sequence)

    def forget(self, sequence: Sequence) -> None:
        """Drops what either keeps."""
        self._ngram.forget(sequence)
        self.model.forget(sequence)
