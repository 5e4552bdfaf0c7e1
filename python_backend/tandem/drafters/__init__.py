"""Drafters guess the tokens that come next; the verifier decides.

A drafter never changes what is generated, only how fast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as Items
from typing import NamedTuple

from torch import Tensor

from tandem.sequence import ScheduledSequence, Sequence


class DraftRequest(NamedTuple):
    """A decoding sequence and the most draft tokens that it can use."""

    sequence: Sequence
    num_tokens: int


class Drafter(ABC):
    """Proposes draft tokens for the sequences of one step; keeps nothing unless it overrides so."""

    @abstractmethod
    def propose(self, requests: Items[DraftRequest]) -> list[list[int]]:
        """Guesses up to `num_tokens` tokens that follow each sequence's known ones."""

    def prefill(self, batch: Items[ScheduledSequence]) -> None:  # noqa: B027
        """Takes the chunks of prompts that the verifier is about to compute."""

    def observe(self, sequence: Sequence, hidden: Tensor) -> None:  # noqa: B027
        """Takes the verifier's hidden state `[hidden_size]` that predicted the last token."""

    def forget(self, sequence: Sequence) -> None:  # noqa: B027
        """Drops what is kept about a sequence that has ended."""
