"""A round whose decisions are all made by the host, which reads each guess of a drafter."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items

from tandem.acceptance.match import Verdict
from tandem.acceptance.verdicts import judge
from tandem.drafters.drafter import Drafter, DraftRequest
from tandem.drafters.rounds import propose
from tandem.lookahead.lookahead import Lookahead
from tandem.models.verifier import Verifier, VerifierOutput
from tandem.requests.sequence import ScheduledSequence, Sequence
from tandem.rounds.round import Round


class HostRound(Round):
    """Phases that run one after the other, as on a CPU they do anyway."""

    def __init__(
        self,
        verifier: Verifier,
        drafters: Mapping[str, Drafter],
        eos_token_ids: frozenset[int],
        rates: Items[float],
    ) -> None:
        """Takes the engine's parts.

        Args:
            rates: `synthetic_acceptance_rates`.
        """
        self._verifier = verifier
        self._drafters = drafters
        self._eos_token_ids = eos_token_ids
        self._rates = rates

    def draft(self, batch: list[ScheduledSequence], lookahead: Lookahead) -> None:
        """See `Round.draft`."""
        propose(self._drafters, batch, lookahead.goes_on)
        lookahead.choose(batch)

    def verify(self, batch: list[ScheduledSequence]) -> VerifierOutput:
        """See `Round.verify`."""
        return self._verifier.forward(batch)

    def accept(
        self, batch: list[ScheduledSequence], output: VerifierOutput
    ) -> list[Verdict | None]:
        """See `Round.accept`."""
        return judge(batch, output, self._eos_token_ids, self._rates)

    def observe(
        self,
        batch: Items[ScheduledSequence],
        output: VerifierOutput,
        verdicts: Items[Verdict | None],
    ) -> None:
        """See `Round.observe`."""
        row = 0
        for scheduled, verdict in zip(batch, verdicts, strict=True):
            if verdict is None:
                continue
            sequence = scheduled.sequence
            drafter = self._drafters.get(sequence.drafter)
            if drafter is not None and not sequence.is_finished:
                drafter.observe(sequence, output.hidden[row + verdict.num_accepted])
            row += scheduled.num_rows

    def guess(self, drafter: str, sequences: Items[Sequence], num_tokens: int) -> None:
        """See `Round.guess`."""
        self._drafters[drafter].propose([DraftRequest(s, num_tokens) for s in sequences])
