"""What computes the phases of a step between scheduling and committing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from collections.abc import Sequence as Items

from tandem.acceptance.match import Verdict
from tandem.lookahead.lookahead import Lookahead
from tandem.models.verifier import VerifierOutput
from tandem.requests.sequence import ScheduledSequence, Sequence


class Round(ABC):
    """One round of drafting, verifying and accepting for a batch."""

    @abstractmethod
    def draft(self, batch: list[ScheduledSequence], lookahead: Lookahead) -> None:
        """Lets each drafter guess for its sequences, and keeps the guesses worth verifying."""

    @abstractmethod
    def verify(self, batch: list[ScheduledSequence]) -> VerifierOutput:
        """One packed pass of the verifier over known tokens and drafts."""

    @abstractmethod
    def accept(
        self, batch: list[ScheduledSequence], output: VerifierOutput
    ) -> list[Verdict | None]:
        """Samples the verifier's token at each position and keeps the drafts that equal it.

        None stands for a sequence whose prompt isn't computed to its end yet, and an empty verdict
        for one whose logits are not numbers.
        """

    @abstractmethod
    def observe(
        self,
        batch: Items[ScheduledSequence],
        output: VerifierOutput,
        verdicts: Items[Verdict | None],
    ) -> None:
        """Tells drafters from where the next round of each sequence goes on."""

    @abstractmethod
    def guess(self, drafter: str, sequences: Items[Sequence], num_tokens: int) -> None:
        """A round of drafting alone, to see what it costs."""

    @property
    def seconds(self) -> Mapping[str, float]:
        """What phases took on the device, where the host's clock doesn't tell."""
        return {}
