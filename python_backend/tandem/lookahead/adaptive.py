"""How far to draft: as far as it makes the batch faster, by measured costs and chances.

A step yields a token for each sequence and the drafts that are accepted, and costs the drafting
and a verifier pass that grows with every draft. What is sought is the most tokens a second. With
the rate that the batch reaches as the *price* of a second, that is the same as choosing, round by
round, the drafts whose expected tokens exceed the price of the time that they cost (Dinkelbach,
"On nonlinear fractional programming", 1967). 0 drafts, for a sequence or for all, is an ordinary
outcome; such a sequence is tried again now and then.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from tandem.lookahead.costs import CostModel
from tandem.lookahead.estimates import Estimates
from tandem.lookahead.lookahead import Lookahead
from tandem.lookahead.plan import BarePass, Plan, best_plan
from tandem.lookahead.prompt_budget import PromptBudget, PromptLimits
from tandem.requests.sequence import ScheduledSequence, Sequence

# The advantage over the plan follows about so many steps, and a single one that was held up counts
# as so many times what was planned.
_ADVANTAGE_STEPS = 50
_MAX_DELAY = 2.0
# Steps after which a sequence without drafts may join a round, and a drafter without rounds has one
# of its own; with so many sequences and guesses.
_PROBE_AFTER = 32
_PROBE_SEQUENCES = 4
_PROBE_GUESSES = 1
# The share of a pass that doesn't count.
_NOTHING = 0.01


@dataclass
class _Advantage:
    """What steps bring against what was planned: choosing by confidence beats the averages."""

    tokens: float = 1.0
    seconds: float = 1.0

    @property
    def value(self) -> float:
        return self.tokens / self.seconds

    def add(self, tokens: float, seconds: float) -> None:
        """Takes a step's tokens and seconds as multiples of the plan's."""
        self.tokens += (tokens - self.tokens) / _ADVANTAGE_STEPS
        self.seconds += (min(seconds, _MAX_DELAY) - self.seconds) / _ADVANTAGE_STEPS


class AdaptiveLookahead(Lookahead):
    """Drafts what raises the tokens a second of the whole batch."""

    costs: CostModel

    def __init__(self, costs: CostModel, max_prefill_slowdown: float = 2.0) -> None:
        """Starts with what was measured.

        Args:
            max_prefill_slowdown: see `PromptBudget`.
        """
        self.costs = costs
        self._prompts = PromptBudget(costs, max_prefill_slowdown)
        self.estimates = Estimates()
        self._advantage = _Advantage()
        self._plan = Plan(1, 1)
        self._price = 0.0  # tokens that a second is worth
        self._base = BarePass(0, 0, 0)
        self._idle_rounds: defaultdict[str, int] = defaultdict(int)
        self._idle_steps: defaultdict[int, int] = defaultdict(int)
        self._probed: set[int] = set()

    # --- before drafting

    def prompt_limits(self, num_decoding: int, num_prompts: int) -> PromptLimits:
        """See `PromptBudget.limits`."""
        return self._prompts.limits(num_decoding, num_prompts)

    def plan(self, batch: Items[ScheduledSequence]) -> None:
        """See `Lookahead.plan`."""
        self._base = BarePass.of(batch)
        self._probed.clear()
        free = [s for s in batch if s.num_draft_tokens > 0 and self._is_free(s)]
        gains = {s: self._gains(s) for s in free}
        self._plan = best = best_plan(self._base, gains, self.costs)
        self._price = best.tokens / best.seconds * self._advantage.value
        limits = {s: s.num_draft_tokens for s in free}
        for scheduled in free:
            if scheduled not in best.chosen and not self._costs_nothing(scheduled):
                scheduled.num_draft_tokens = 0
        self._probe(limits)

    def _costs_nothing(self, scheduled: ScheduledSequence) -> bool:
        """Whether guessing is so cheap that only verifying counts."""
        guess = self.costs.draft(scheduled.sequence.drafter, 1, scheduled.num_draft_tokens)
        return guess < _NOTHING * self._verify(self._base.num_rows)

    def _gains(self, scheduled: ScheduledSequence) -> list[float]:
        """Expected tokens of each guess: the chance that it and all before it are accepted."""
        chances = self.estimates.chances(scheduled.sequence, scheduled.num_draft_tokens)
        return list(accumulate(chances, mul))

    def _verify(self, num_rows: int) -> float:
        return self._base.seconds(self.costs, num_rows)

    def _probe(self, limits: Mapping[ScheduledSequence, int]) -> None:
        """Gives sequences without drafts one now and then: things may have changed."""
        drafting = {s.sequence.drafter for s in limits if s.num_draft_tokens > 0}
        for name in {s.sequence.drafter for s in limits}:
            self._idle_rounds[name] = 0 if name in drafting else self._idle_rounds[name] + 1
        due: dict[str, list[ScheduledSequence]] = defaultdict(list)
        for scheduled in limits:
            if self._idle_steps[scheduled.sequence.id] >= _PROBE_AFTER:
                due[scheduled.sequence.drafter].append(scheduled)
        for name, group in due.items():
            if name in drafting or self._idle_rounds[name] >= _PROBE_AFTER:
                self._idle_rounds[name] = 0
                group.sort(key=lambda s: -self._idle_steps[s.sequence.id])
                for scheduled in group[:_PROBE_SEQUENCES]:
                    scheduled.num_draft_tokens = min(limits[scheduled], _PROBE_GUESSES)
                    self._idle_steps[scheduled.sequence.id] = 0
                    self._probed.add(scheduled.sequence.id)

    # --- while drafting

    def goes_on(self, sequences: Items[Sequence], confidences: Items[Items[float]]) -> bool:
        """See `Lookahead.goes_on`: compares every further depth with stopping here."""
        num_made = len(confidences[0]) if confidences else 0
        drafter = sequences[0].drafter
        if any(s.fixed_lookahead for s in sequences):
            return True
        further = []
        for sequence, known in zip(sequences, confidences, strict=True):
            reached = 1.0
            for confidence in known:
                reached *= self.estimates.of(sequence, "", confidence)
            chances = self.estimates.chances(sequence, sequence.max_lookahead)[num_made:]
            further.append(list(accumulate(chances, mul, initial=reached))[1:])
        num_rows = self._base.num_rows + num_made * len(sequences)
        verify = self._verify(num_rows + len(sequences)) - self._verify(num_rows)
        per_row = self._price * verify / len(sequences)
        guess = self.costs.draft(drafter, len(sequences), 2) - self.costs.draft(
            drafter, len(sequences), 1
        )
        value = 0.0
        for position in range(max(map(len, further))):
            value -= self._price * guess
            for gains in further:
                if position < len(gains):
                    value += max(0.0, gains[position] - per_row)
            if value > 0:
                return True
        return False

    # --- before verifying

    def choose(self, batch: Items[ScheduledSequence]) -> None:
        """See `Lookahead.choose`: the likeliest drafts, as many as are worth their rows."""
        super().choose(batch)
        _, least = self._worthwhile(batch)
        for scheduled in batch:
            if self._is_free(scheduled):
                kept = sum(gain >= least for gain in self._verified_gains(scheduled))
                scheduled.num_draft_tokens = kept
        self.settle(batch)

    def settle(self, batch: Items[ScheduledSequence]) -> None:
        """See `Lookahead.settle`."""
        for scheduled in batch:
            if scheduled.sequence.max_lookahead > 0 and scheduled.num_draft_tokens == 0:
                self._idle_steps[scheduled.sequence.id] += 1
                self.estimates.pause(scheduled.sequence)
            else:
                self._idle_steps.pop(scheduled.sequence.id, None)

    def _worthwhile(self, batch: Items[ScheduledSequence]) -> tuple[int, float]:
        """Drafts that are worth their rows: how many, and the least that one of them gains."""
        free = [s for s in batch if s.num_draft_tokens > 0 and self._is_free(s)]
        guesses = sorted((gain for s in free for gain in self._verified_gains(s)), reverse=True)
        num_fixed = sum(s.num_draft_tokens for s in batch) - len(guesses)
        num_rows = self._base.num_rows + num_fixed
        start = self._verify(num_rows)
        value = best = 0.0
        num_best, least = 0, float("inf")
        for count, gain in enumerate(guesses, start=1):
            value += gain
            worth = value - self._price * (self._verify(num_rows + count) - start)
            if worth > best:
                best, num_best, least = worth, count, gain
        return num_fixed + num_best, least

    # --- the same where guesses are made and chosen on the device

    def allow(self, batch: Items[ScheduledSequence]) -> int:
        """See `Lookahead.allow`: by the chances of guesses that are not made yet."""
        for scheduled in batch:
            if not scheduled.draft.token_ids and self._is_free(scheduled):
                depth = self._plan.depths.get(scheduled.sequence.drafter, 0)
                scheduled.num_draft_tokens = min(scheduled.num_draft_tokens, depth)
        num_tokens, _ = self._worthwhile(batch)
        return num_tokens

    def gains(self, scheduled: ScheduledSequence) -> list[float] | None:
        """See `Lookahead.gains`."""
        if not self._is_free(scheduled):
            return super().gains(scheduled)
        return self._verified_gains(scheduled) if scheduled.draft.token_ids else None

    def chances(self, sequence: Sequence) -> list[float]:
        """See `Lookahead.chances`."""
        return self.estimates.by_bin(sequence, "")

    def _is_free(self, scheduled: ScheduledSequence) -> bool:
        sequence = scheduled.sequence
        fixed = sequence.fixed_lookahead or scheduled.is_forced
        return not fixed and sequence.id not in self._probed

    def _verified_gains(self, scheduled: ScheduledSequence) -> list[float]:
        """Expected tokens of each draft, by what its drafter said of it if it did."""
        _, confidences, source = scheduled.draft
        if not confidences:
            return self._gains(scheduled)
        chances = (self.estimates.of(scheduled.sequence, source, c) for c in confidences)
        return list(accumulate(chances, mul))[: scheduled.num_draft_tokens]

    # --- after the step

    def observe(
        self,
        batch: Items[ScheduledSequence],
        num_accepted: Items[int | None],
        seconds: Mapping[str, float],
    ) -> None:
        """See `Lookahead.observe`."""
        tokens = 0
        for scheduled, accepted in zip(batch, num_accepted, strict=True):
            if accepted is None:
                continue
            tokens += accepted + 1
            if scheduled.draft.token_ids and not scheduled.is_forced:
                _, confidences, source = scheduled.draft
                self.estimates.observe(
                    scheduled.sequence, source, confidences, scheduled.num_draft_tokens, accepted
                )
        base = self._base
        rows = base.num_rows + sum(s.num_draft_tokens for s in batch)
        verify = seconds["verify"] + seconds["accept"]
        num_decoding = sum(s.sequence.is_decoding for s in batch)
        on_prompts = 0.0
        if base.num_prompt_tokens > 0:
            on_prompts = verify - self.costs.verify(rows, base.num_sequences)
        self._prompts.observe(num_decoding, on_prompts)
        self.costs.observe_verify(rows, base.num_sequences, base.num_prompt_tokens, verify)
        self.costs.observe_rest(seconds["schedule"] + seconds["commit"])
        if base.num_prompt_tokens == 0:
            took = sum(seconds.values())
            self._advantage.add(tokens / self._plan.tokens, took / self._plan.seconds)
        self._observe_draft(batch, seconds["draft"])

    def _observe_draft(self, batch: Items[ScheduledSequence], seconds: float) -> None:
        drafted = [s for s in batch if s.draft.token_ids and not s.is_forced]
        names = {s.sequence.drafter for s in drafted}
        if len(names) == 1:  # else who took how much is not known
            depth = max(len(s.draft.token_ids) for s in drafted)
            self.costs.observe_draft(names.pop(), len(drafted), depth, seconds)

    @property
    def num_known(self) -> int:
        """Sequences that something is kept about."""
        return len(self._idle_steps)

    def forget(self, sequence: Sequence) -> None:
        """See `Lookahead.forget`."""
        self.estimates.forget(sequence)
        self._idle_steps.pop(sequence.id, None)
