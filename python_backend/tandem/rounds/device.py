"""A round that runs on the device from the first guess to the last accepted token.

The host sends who takes part and what changed in one copy, launches what drafts, verifies and
accepts, and reads tokens and counts in one copy. What lies behind the last real row of a size is
computed for nobody.

What the host has to see before tokens are chosen (grammars, bad words, log probabilities) comes
first in the row, and is sampled by the host from the same pass.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as Items
from itertools import accumulate
from typing import Any

import torch

from tandem.acceptance.match import Verdict
from tandem.acceptance.selection import Selection, select
from tandem.acceptance.verdicts import verdict
from tandem.config import EngineConfig
from tandem.drafters.combined import CombinedDrafter
from tandem.drafters.drafter import Drafter, DraftRequest
from tandem.drafters.mtp import MTPDrafter
from tandem.drafters.rounds import propose
from tandem.errors import ConfigError
from tandem.lookahead.lookahead import Lookahead
from tandem.models.verifier import Verifier, VerifierOutput
from tandem.requests.sequence import Draft, ScheduledSequence, Sequence
from tandem.rounds.adjusting import columns_of, is_adjusted_here
from tandem.rounds.lines import write_lines
from tandem.rounds.programs import PassSize, Programs, Verified
from tandem.rounds.round import Round
from tandem.rounds.slots import Slots
from tandem.rounds.state import MAX_CHANGES, DeviceState
from tandem.sampling.processors import is_adjusted
from tandem.wing import RoundTools


class DeviceRound(Round):
    """Rounds of a wing whose kernels read the block pool and sample.

    Attributes:
        programs: what is launched.
        size: of the pass that was sent last.
    """

    def __init__(
        self,
        verifier: Verifier,
        drafters: Mapping[str, Drafter],
        eos_token_ids: frozenset[int],
        config: EngineConfig,
        max_model_len: int,
        tools: RoundTools,
    ) -> None:
        """Allocates what stays on the device, and makes the graphs.

        Args:
            drafters: by name; assistants among them draft on the device, the others on the host.
            eos_token_ids: the verifier's.
            tools: of the wing.

        Raises:
            ConfigError: graphs find no memory.
        """
        self._head = verifier.head
        self._drafters = drafters
        self._eos_token_ids = eos_token_ids
        self._rates = config.synthetic_acceptance_rates
        self._tools = tools
        self._state = state = DeviceState(verifier, config, max_model_len)
        self._slots = Slots(state.num_slots, len(verifier.cache.windows))
        models = [model for model in map(_model_of, drafters.values()) if model is not None]
        self._numbers = {model: number for number, model in enumerate(dict.fromkeys(models))}
        most = min(state.num_slots * (1 + state.max_drafts), config.max_num_batched_tokens)
        self.programs = Programs(verifier, list(self._numbers), state, tools, most)
        # --- of the round that is going on
        self._order: list[ScheduledSequence] = []
        self._models: dict[ScheduledSequence, int] = {}
        self.size = PassSize(0, 0)
        self._adjusts = False
        self._verified: Verified | None = None
        self._lookahead = Lookahead()
        self._started = 0.0
        self._seconds: dict[str, float] = {}
        self._marks = [tools.mark() for _ in range(3)]
        self._sent = tools.mark()
        if not config.enforce_eager:
            self._send([], 0)
            try:
                self.programs.capture()
            except torch.OutOfMemoryError as error:
                raise ConfigError(
                    "CUDA graphs find no memory: lower kv_cache_tokens or gpu_memory_utilization, "
                    "so that the KV cache leaves some, lower max_num_seqs, or set enforce_eager"
                ) from error

    # --- the phases

    def draft(self, batch: list[ScheduledSequence], lookahead: Lookahead) -> None:
        """See `Round.draft`; guesses of models are read only where the host has to see them."""
        self._started = time.perf_counter()
        self._lookahead = lookahead
        self._models = {}
        on_host = [s for s in batch if not self._is_for_model(s)]
        propose(self._drafters, on_host, lookahead.goes_on)
        for scheduled in on_host:
            scheduled.num_draft_tokens = len(scheduled.draft_ids)
        self._send(batch, lookahead.allow(batch))
        self._launch_drafts()
        self._read_guesses()

    def verify(self, batch: list[ScheduledSequence]) -> VerifierOutput:
        """See `Round.verify`; of a batch that has seen no `draft`, drafts are known."""
        if {*batch} != {*self._order}:
            self._started = time.perf_counter()
            self._lookahead = Lookahead()
            self._send(batch, sum(s.num_draft_tokens for s in batch))
        self._tools.record(self._marks[1])
        self._verified = verified = self.programs.verify(self.size, _scored_rows(self._order))
        num_sampled = len(verified.places)
        return VerifierOutput(verified.states, self._head, verified.logits, num_sampled)

    def accept(
        self, batch: list[ScheduledSequence], output: VerifierOutput
    ) -> list[Verdict | None]:
        """See `Round.accept`; here is the one read of the step."""
        assert self._verified is not None
        self.programs.accept(self.size, self._verified, adjusts=self._adjusts)
        self._tools.record(self._marks[2])
        self._state.results.receive()
        self._take_drafts()
        self._lookahead.settle(batch)
        seen = [s for s in self._order if self._needs_host(s) and s.yields_token]
        selections = select(output, seen, self._eos_token_ids) if seen else {}
        tokens = self._results("tokens")
        found: dict[ScheduledSequence, Verdict] = {}
        for scheduled, row in zip(self._order, tokens, strict=True):
            if scheduled.yields_token:
                selection = selections.get(scheduled) or Selection(row[: scheduled.num_rows])
                found[scheduled] = verdict(scheduled, selection, self._rates)
        if seen:
            self._keep_states(seen, found, output)
        self._note_time()
        self._order, self._models, self._verified = [], {}, None
        return [found.get(scheduled) for scheduled in batch]

    def observe(
        self,
        batch: Items[ScheduledSequence],
        output: VerifierOutput,
        verdicts: Items[Verdict | None],
    ) -> None:
        """See `Round.observe`; an assistant's state lies in its slot already."""
        for scheduled, each in zip(batch, verdicts, strict=True):
            sequence = scheduled.sequence
            drafter = self._drafters.get(sequence.drafter)
            if drafter is None or each is None or sequence.is_finished:
                continue
            if _model_of(drafter) is None:
                drafter.observe(sequence, output.hidden[0])

    def guess(self, drafter: str, sequences: Items[Sequence], num_tokens: int) -> None:
        """See `Round.guess`."""
        model = _model_of(self._drafters[drafter])
        if model is None:
            self._drafters[drafter].propose([DraftRequest(s, num_tokens) for s in sequences])
            return
        batch = [ScheduledSequence(s, 1, num_tokens) for s in sequences]
        self._models = dict.fromkeys(batch, self._numbers[model])
        self._send(batch, num_tokens * len(batch))
        self._launch_drafts()
        self._order, self._models = [], {}

    @property
    def seconds(self) -> Mapping[str, float]:
        """See `Round.seconds`."""
        return self._seconds

    def _needs_host(self, scheduled: ScheduledSequence) -> bool:
        """Whether the host has to see logits before tokens are chosen."""
        sequence = scheduled.sequence
        is_plain = not is_adjusted(sequence) or is_adjusted_here(sequence, self._eos_token_ids)
        is_asked = sequence.params.logprobs is not None or bool(scheduled.scored_rows)
        return is_asked or not is_plain

    # --- before the pass

    def _is_for_model(self, scheduled: ScheduledSequence) -> bool:
        """Whether a model is to guess; what lookup finds becomes the draft at once."""
        if scheduled.num_draft_tokens == 0 or scheduled.is_forced:
            return False
        drafter = self._drafters[scheduled.sequence.drafter]
        model = _model_of(drafter)
        if model is None:
            return False
        if isinstance(drafter, CombinedDrafter):
            request = DraftRequest(scheduled.sequence, scheduled.num_draft_tokens)
            if (draft := drafter.look_up(request)) is not None:
                scheduled.draft = draft
                return False
            scheduled.num_draft_tokens = drafter.for_model(request).num_tokens
        self._models[scheduled] = self._numbers[model]
        return True

    def _send(self, batch: list[ScheduledSequence], num_drafts: int) -> None:
        """Tells the device who takes part.

        Args:
            num_drafts: draft tokens to be verified at most.
        """
        # What the host samples comes first, so that its rows are the first that are sampled; of
        # that what is scored, so that the host knows where it lies.
        self._order = order = sorted(
            batch, key=lambda s: (not s.scored_rows, not self._needs_host(s))
        )
        num_known = sum(s.num_tokens for s in order)
        num_sampled = sum(s.yields_token for s in order) + num_drafts
        self.size = self.programs.pass_size(num_known + num_drafts, num_sampled)
        state, sequences = self._state, [s.sequence for s in order]
        # What is being copied must not be written.
        self._tools.wait(self._sent)
        slots = self._slots.assign(sequences)
        write_lines(state, order, slots, self._models, self._lookahead, self._rates)
        # Rows that a size has too many are given to drafts.
        state.inputs.host["num_rows"][0] = self.size.num_rows - num_known
        changes = state.in_tables(self._slots.changes(sequences))
        changes += self._write_adjustments(order, slots)
        while len(changes) > MAX_CHANGES:
            state.write_changes(changes[:MAX_CHANGES])
            changes = changes[MAX_CHANGES:]
            self._copy()
            state.take_changes()
            self._tools.wait(self._sent)
        state.write_changes(changes)
        self._tools.record(self._marks[0])
        self._copy()

    def _copy(self) -> None:
        self._state.inputs.send()
        self._tools.record(self._sent)

    def _write_adjustments(
        self, order: Items[ScheduledSequence], slots: Items[int]
    ) -> list[tuple[int, int]]:
        """Tells the device how logits are changed; cells of tokens that it needs for that."""
        state, eos = self._state, self._eos_token_ids
        changes: list[tuple[int, int]] = []
        adjusted = [is_adjusted_here(s.sequence, eos) for s in order]
        self._adjusts = any(adjusted)
        if not self._adjusts:
            return changes
        sequences = [s.sequence for s in order]
        for name, values in columns_of(sequences, eos).items():
            state.adjustments.host[name][: len(order)] = values
        state.adjustments.send()
        for sequence, slot, is_here in zip(sequences, slots, adjusted, strict=True):
            if is_here and self._slots.lacks_history(slot):
                known = sequence.token_ids[: sequence.num_computed]
                changes += state.in_history(slot, known)
        return changes

    def _launch_drafts(self) -> None:
        """Lets each model guess, for all its sequences as far as for the one that goes furthest."""
        for model in {*self._models.values()}:
            asked = [
                (place, scheduled.num_draft_tokens)
                for place, scheduled in enumerate(self._order)
                if self._models.get(scheduled) == model and scheduled.num_draft_tokens > 0
            ]
            if asked:
                places, depths = zip(*asked, strict=True)
                self.programs.draft(model, max(places) + 1, max(depths))

    def _read_guesses(self) -> None:
        """Reads the guesses for sequences with a grammar, which may forbid some."""
        seen = [
            (place, scheduled)
            for place, scheduled in enumerate(self._order)
            if scheduled in self._models and scheduled.sequence.grammar is not None
        ]
        if not seen:
            return
        stop = seen[-1][0] + 1
        guesses = self._state.guesses[:stop].tolist()
        confidences = self._state.confidences[:stop].tolist()
        host = self._state.inputs.host
        for place, scheduled in seen:
            draft = Draft(guesses[place], confidences[place]).first(scheduled.num_draft_tokens)
            grammar = scheduled.sequence.grammar
            assert grammar is not None
            scheduled.draft = draft = draft.first(grammar.num_valid(draft.token_ids))
            scheduled.num_draft_tokens = host["limit"][place] = len(draft.token_ids)
        self._copy()

    # --- behind the pass

    def _results(self, name: str) -> list[Any]:
        """What was read for each place of the batch."""
        found: list[Any] = self._state.results.host[name][: len(self._order)].tolist()
        return found

    def _take_drafts(self) -> None:
        """Writes down what was guessed, and what of it was verified."""
        columns = map(self._results, ("num_drafts", "drafts", "confidences"))
        for scheduled, num_drafts, *draft in zip(self._order, *columns, strict=True):
            if scheduled in self._models and not scheduled.draft.token_ids:
                scheduled.draft = Draft(*draft).first(scheduled.num_draft_tokens)
            scheduled.num_draft_tokens = num_drafts

    def _keep_states(
        self,
        seen: Items[ScheduledSequence],
        found: Mapping[ScheduledSequence, Verdict],
        output: VerifierOutput,
    ) -> None:
        """Puts the states behind what the host accepted in their slots."""
        first = accumulate((s.num_rows for s in seen), initial=0)
        rows = [row + found[s].num_accepted for s, row in zip(seen, first, strict=False)]
        slots = self._slots.assign([s.sequence for s in seen])
        device = output.hidden.device
        states = output.hidden[torch.tensor(rows, device=device)]
        self._state.hidden.index_copy_(0, torch.tensor(slots, device=device), states)

    def _note_time(self) -> None:
        total = time.perf_counter() - self._started
        draft, verify = (
            self._tools.seconds_between(*pair) for pair in (self._marks[:2], self._marks[1:])
        )
        self._seconds = {
            "draft": draft,
            "verify": verify,
            "accept": max(0.0, total - draft - verify),
        }


def _scored_rows(order: Items[ScheduledSequence]) -> list[int]:
    """Where tokens of prompts are scored; sequences with such rows come first, without drafts."""
    ends = accumulate((s.num_tokens for s in order), initial=0)
    return [first + row for first, s in zip(ends, order, strict=False) for row in s.scored_rows]


def _model_of(drafter: Drafter) -> MTPDrafter | None:
    """The assistant of a drafter, which guesses on the device."""
    if isinstance(drafter, CombinedDrafter):
        drafter = drafter.model
    return drafter if isinstance(drafter, MTPDrafter) else None
