"""Drafters guess the tokens that come next; the verifier decides.

A drafter never changes what is generated, only how fast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import NamedTuple

from torch import Tensor

from tandem.requests.sequence import Draft, ScheduledSequence, Sequence


class DraftRequest(NamedTuple):
    """A decoding sequence and the most draft tokens that it can use."""

    sequence: Sequence
    num_tokens: int


# Whether one guess more for each of these sequences pays, given how sure their drafter was of each
# guess of the round so far.
GoesOn = Callable[[Items[Sequence], Items[Items[float]]], bool]


def always(sequences: Items[Sequence], confidences: Items[Items[float]]) -> bool:
    """A `GoesOn` for rounds of fixed length."""
    return True


class Drafter(ABC):
    """Proposes draft tokens for the sequences of one step; keeps nothing unless it overrides so.

    Attributes:
        vocabulary: the tokens that it can guess, if not all.
        trained_length: tokens of the texts that it was trained on, if that is known.
    """

    vocabulary: frozenset[int] | None = None
    trained_length: int | None = None

    @abstractmethod
    def propose(self, requests: Items[DraftRequest], goes_on: GoesOn = always) -> list[Draft]:
        """Guesses up to `num_tokens` tokens that follow each sequence's known ones.

        Args:
            goes_on: asked before each further guess that costs something.
        """

    def prefill(self, batch: Items[ScheduledSequence]) -> None:  # noqa: B027
        """Takes the chunks of prompts that the verifier is about to compute."""

    def observe(self, sequence: Sequence, hidden: Tensor) -> None:  # noqa: B027
        """Takes the verifier's hidden state `[hidden_size]` that predicted the last token."""

    def num_cached(self, sequence: Sequence) -> int:
        """Committed tokens whose K/V are complete: the verifier's, and what the drafter has."""
        return sequence.num_computed

    def forget(self, sequence: Sequence) -> None:  # noqa: B027
        """Drops what is kept about a sequence that has ended."""
