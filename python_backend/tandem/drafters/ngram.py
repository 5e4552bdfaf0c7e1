"""Prompt lookup: what followed the same few tokens earlier in this sequence."""

from __future__ import annotations

from collections.abc import Sequence as Items

from tandem.drafters import Drafter, DraftRequest
from tandem.sequence import Sequence


class _Index:
    """Where each n-gram of one sequence was last followed by something."""

    def __init__(self, sizes: range) -> None:
        self._sizes = sizes
        self._next: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def extend(self, token_ids: list[int]) -> None:
        """Adds the n-grams that end before the last token; those have a continuation."""
        for end in range(self._indexed, len(token_ids) - 1):
            for size in self._sizes:
                if size <= end + 1:
                    self._next[tuple(token_ids[end + 1 - size : end + 1])] = end + 1
        self._indexed = max(self._indexed, len(token_ids) - 1)

    def find(self, token_ids: list[int]) -> int | None:
        """Where the longest known suffix was followed last."""
        for size in reversed(self._sizes):
            position = self._next.get(tuple(token_ids[-size:]))
            if position is not None and size <= len(token_ids):
                return position
        return None


class NgramDrafter(Drafter):
    """Copies the most recent continuation of the longest matching suffix.

    Source: prompt lookup decoding (Saxena, 2023).
    """

    def __init__(self, min_ngram_size: int, max_ngram_size: int) -> None:
        self._sizes = range(min_ngram_size, max_ngram_size + 1)
        self._indexes: dict[int, _Index] = {}

    def propose(self, requests: Items[DraftRequest]) -> list[list[int]]:
        """Guesses nothing for a sequence whose suffix is new."""
        return [self._continue(request) for request in requests]

    def _continue(self, request: DraftRequest) -> list[int]:
        token_ids = request.sequence.token_ids
        index = self._indexes.setdefault(request.sequence.id, _Index(self._sizes))
        index.extend(token_ids)
        position = index.find(token_ids)
        if position is None:
            return []
        # Reading on into the drafts themselves continues a loop for as long as is asked.
        text = token_ids[position:]
        for offset in range(request.num_tokens):
            text.append(text[offset])
        return text[len(token_ids) - position :]

    def forget(self, sequence: Sequence) -> None:
        """Drops the sequence's index."""
        self._indexes.pop(sequence.id, None)
