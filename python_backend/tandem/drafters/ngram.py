"""Prompt lookup: what followed the same tokens earlier in this sequence, or in others.

Source: prompt lookup decoding (Saxena, 2023); the choice among several places as in a suffix tree
with counts (SuffixDecoding: Oliaro et al., 2024).
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from typing import NamedTuple

from tandem.drafters.drafter import Drafter, DraftRequest, GoesOn, always
from tandem.requests.sequence import Draft, Sequence

# How many of a suffix's earlier places are compared, the most recent ones.
_MAX_PLACES = 32


class Match(NamedTuple):
    """An earlier place where the same tokens stood."""

    text: list[int]
    position: int  # of what followed, in `text`
    size: int  # tokens that are the same


class _Index:
    """Where the n-grams of the smallest size stand in one text; grows with it."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._places: defaultdict[tuple[int, ...], deque[int]] = defaultdict(
            lambda: deque(maxlen=_MAX_PLACES)
        )
        self._indexed = 0

    def extend(self, text: list[int]) -> None:
        """Adds the n-grams that end before the last token; those have a continuation."""
        for end in range(max(self._indexed, self._size), len(text)):
            self._places[tuple(text[end - self._size : end])].append(end)
        self._indexed = max(self._indexed, len(text))

    def places(self, suffix: Items[int]) -> Iterator[int]:
        """Behind which positions the last tokens of `suffix` stand, the most recent first."""
        if len(suffix) >= self._size:
            yield from reversed(self._places.get(tuple(suffix[-self._size :]), ()))


class NgramDrafter(Drafter):
    """Copies what followed the longest match of a sequence's suffix.

    Among matches of the same length the commonest next token wins, then the most recent place.
    """

    def __init__(
        self, min_ngram_size: int, max_ngram_size: int, num_shared_tokens: int = 0
    ) -> None:
        """Starts without any text.

        Args:
            num_shared_tokens: tokens of ended sequences that others may be continued with. Their
                guesses, and by timing their users, then learn of each other's texts.
        """
        self._min_size = min_ngram_size
        self._max_size = max_ngram_size
        self._indexes: dict[int, _Index] = {}
        self._num_shared_tokens = num_shared_tokens
        self._shared: deque[tuple[list[int], _Index]] = deque()

    def propose(self, requests: Items[DraftRequest], goes_on: GoesOn = always) -> list[Draft]:
        """Guesses nothing for a sequence whose suffix is new."""
        drafts = []
        for sequence, num_tokens in requests:
            match = self.find(sequence)
            drafts.append(Draft([]) if match is None else copy(match, num_tokens))
        return drafts

    def find(self, sequence: Sequence) -> Match | None:
        """The best earlier place: in the sequence itself, else in the shared texts."""
        index = self._indexes.setdefault(sequence.id, _Index(self._min_size))
        index.extend(sequence.token_ids)
        own = self._best(sequence.token_ids, [(sequence.token_ids, index)])
        if own is not None:
            return own
        return self._best(sequence.token_ids, reversed(self._shared))

    def _best(self, suffix: list[int], texts: Iterable[tuple[list[int], _Index]]) -> Match | None:
        matches = [
            Match(text, place, self._size_of_match(suffix, text, place))
            for text, index in texts
            for place in index.places(suffix)
        ]
        if not matches:
            return None
        longest = max(match.size for match in matches)
        matches = [match for match in matches if match.size == longest]
        counts = Counter(match.text[match.position] for match in matches)
        # Of the commonest, the first is the most recent.
        return max(matches, key=lambda match: counts[match.text[match.position]])

    def _size_of_match(self, suffix: list[int], text: list[int], place: int) -> int:
        size = self._min_size
        limit = min(self._max_size, place, len(suffix))
        while size < limit and text[place - 1 - size] == suffix[-1 - size]:
            size += 1
        return size

    def forget(self, sequence: Sequence) -> None:
        """Drops the sequence's index, or keeps it for others to be continued with."""
        index = self._indexes.pop(sequence.id, None)
        if not self._num_shared_tokens or index is None:
            return
        index.extend(sequence.token_ids)
        self._shared.append((sequence.token_ids, index))
        while sum(len(text) for text, _ in self._shared) > self._num_shared_tokens:
            self._shared.popleft()


def copy(match: Match, num_tokens: int) -> Draft:
    """What followed at the match; reading on into the copy itself continues a loop."""
    text = match.text[match.position : match.position + num_tokens]
    for offset in range(num_tokens - len(text)):
        text.append(text[offset])
    # No probability, but the longer the match, the likelier it goes on.
    return Draft(text, [match.size / (match.size + 2)] * num_tokens, "ngram")
