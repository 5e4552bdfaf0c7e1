"""How far to draft: never past what a sequence can use, and only where it pays."""

from __future__ import annotations

import random
from collections.abc import Iterator
from collections.abc import Sequence as Items
from itertools import count

import pytest

from made_up_costs import costs
from tandem import SamplingParams, Sequence
from tandem.lookahead.adaptive import AdaptiveLookahead
from tandem.lookahead.costs import CostModel
from tandem.lookahead.lookahead import Lookahead, draft_limit
from tandem.requests.sequence import Draft, ScheduledSequence

LIMIT = 8
NUM_TOKENS = 128


def sequence(
    num_prompt: int, num_output: int, max_tokens: int, limit: int, number: int = 0
) -> Sequence:
    return Sequence(
        id=number,
        token_ids=[9] * (num_prompt + num_output),
        num_prompt_tokens=num_prompt,
        params=SamplingParams(temperature=0.0, max_tokens=max_tokens),
        seed=0,
        drafter="model",
        max_lookahead=limit,
        num_computed=num_prompt + num_output - 1,
    )


@pytest.mark.parametrize(
    ("num_output", "max_tokens", "max_model_len", "expected"),
    [
        (1, 100, 100, 4),  # nothing in the way
        (1, 6, 100, 4),  # 5 tokens left: 4 drafts and one token of the verifier's own
        (1, 5, 100, 3),
        (1, 2, 100, 0),  # the verifier's own token is the last
        (1, 100, 14, 2),  # the model's length leaves 3
        (1, 100, 12, 0),
    ],
)
def test_drafts_leave_room_for_the_verifiers_own_token(
    num_output: int, max_tokens: int, max_model_len: int, expected: int
) -> None:
    assert draft_limit(sequence(10, num_output, max_tokens, 4), max_model_len) == expected


def test_there_are_no_drafts_without_a_drafter() -> None:
    assert draft_limit(sequence(10, 1, 100, 0), 100) == 0


def test_the_limit_is_never_negative() -> None:
    assert draft_limit(sequence(10, 5, 5, 4), 15) == 0


# --- a service whose guesses are right by chance, on a clock that follows the cost model


class Service:
    """Keeps `concurrency` sequences running; each is luckier or less so than `acceptance`."""

    def __init__(self, lookahead: Lookahead, concurrency: int, acceptance: float) -> None:
        self._lookahead = lookahead
        self._acceptance = acceptance
        self._random = random.Random(0)
        self._truth = CostModel(costs("model"))
        self._ids = count()
        self._chances: dict[Sequence, float] = {}
        self._running = [self._arrive() for _ in range(concurrency)]
        self.lengths: list[int] = []  # drafts of each sequence in each step

    def _arrive(self) -> Sequence:
        arrived = sequence(8, 1, NUM_TOKENS, LIMIT, next(self._ids))
        chance = self._random.gauss(self._acceptance, 0.2)
        self._chances[arrived] = min(0.97, max(0.01, chance))
        return arrived

    def rate(self, seconds: float, fixed: int | None = None) -> float:
        """Tokens a second; with `fixed` drafts if the lookahead leaves it to its caller."""
        tokens = spent = 0.0
        while spent < seconds:
            took = self._step(fixed)
            spent += sum(took.values())
            tokens += sum(self._commit())
        return tokens / spent

    def _step(self, fixed: int | None) -> dict[str, float]:
        self._batch = []
        for running in self._running:
            limit = draft_limit(running, 10**6)
            limit = limit if fixed is None else min(fixed, limit)
            self._batch.append(ScheduledSequence(running, 1, limit))
        self._lookahead.plan(self._batch)
        drafting = [s for s in self._batch if s.num_draft_tokens > 0]
        depth = self._draft(drafting)
        self._lookahead.choose(self._batch)
        self._accepted = []
        for scheduled in self._batch:
            self.lengths.append(scheduled.num_draft_tokens)
            chances = self._truths.get(scheduled, [])[: scheduled.num_draft_tokens]
            hits = [self._random.random() < chance for chance in chances]
            self._accepted.append((*hits, False).index(False))
        rows = len(self._batch) + sum(s.num_draft_tokens for s in self._batch)
        seconds = {
            "schedule": 1e-4,
            "draft": self._truth.draft("model", len(drafting), depth),
            "verify": self._truth.verify(rows, len(self._batch)),
            "accept": 0.0,
            "commit": 1e-4,
        }
        self._lookahead.observe(self._batch, self._accepted, seconds)
        return seconds

    def _draft(self, drafting: Items[ScheduledSequence]) -> int:
        """The drafter knows, more or less, which of its guesses are good."""
        self._truths: dict[ScheduledSequence, list[float]] = {s: [] for s in drafting}
        drafts = {s: Draft([], []) for s in drafting}
        depth = 0
        for step in range(max((s.num_draft_tokens for s in drafting), default=0)):
            known = [drafts[s].confidences for s in drafting]
            if step > 0 and not self._lookahead.goes_on([s.sequence for s in drafting], known):
                break
            depth += 1
            for scheduled in drafting:
                mean = self._chances[scheduled.sequence]
                good = self._random.random() < mean
                chance = mean + (1 - mean) * 0.8 if good else mean * 0.2
                self._truths[scheduled].append(chance)
                drafts[scheduled].token_ids.append(1)
                noisy = min(1.0, max(0.0, chance + self._random.gauss(0, 0.1)))
                drafts[scheduled].confidences.append(noisy)
        for scheduled in drafting:
            scheduled.draft = drafts[scheduled].first(scheduled.num_draft_tokens)
        return depth

    def _commit(self) -> Iterator[int]:
        for index, accepted in enumerate(self._accepted):
            running = self._running[index]
            running.token_ids += [9] * (accepted + 1)
            running.num_computed += accepted + 1
            yield accepted + 1
            if running.num_output_tokens >= NUM_TOKENS:
                self._lookahead.forget(running)
                self._running[index] = self._arrive()


@pytest.mark.parametrize("concurrency", [1, 4, 16, 32])
@pytest.mark.parametrize("acceptance", [0.02, 0.3, 0.5, 0.7, 0.9])
def test_no_fixed_lookahead_is_much_better(acceptance: float, concurrency: int) -> None:
    """On the service's own clock, once the lookahead has learnt how good its drafter is."""
    lookahead = AdaptiveLookahead(CostModel(costs("model")))
    Service(lookahead, concurrency, acceptance).rate(3)
    adaptive = Service(lookahead, concurrency, acceptance).rate(20)
    fixed = {
        k: Service(Lookahead(), concurrency, acceptance).rate(20, fixed=k)
        for k in (0, 1, 2, 4, LIMIT)
    }
    assert adaptive > 0.95 * max(fixed.values()), fixed
    assert adaptive > 0.97 * fixed[0], fixed


def test_a_drafter_that_never_hits_is_left_alone_but_tried_again() -> None:
    lookahead = AdaptiveLookahead(CostModel(costs("model")))
    service = Service(lookahead, 8, -10.0)
    service.rate(3)
    service.lengths.clear()
    service.rate(10)
    assert 0 < sum(service.lengths) < 0.05 * len(service.lengths)


def test_a_fixed_lookahead_is_left_as_it_is() -> None:
    lookahead = AdaptiveLookahead(CostModel(costs("model")))
    Service(lookahead, 8, -10.0).rate(3)
    wished = sequence(8, 1, NUM_TOKENS, 3)
    wished.fixed_lookahead = True
    scheduled = ScheduledSequence(wished, 1, 3)
    lookahead.plan([scheduled])
    assert scheduled.num_draft_tokens == 3
    assert lookahead.goes_on([wished], [[0.01, 0.01]])
    scheduled.draft = Draft([1, 2, 3], [0.01, 0.01, 0.01])
    lookahead.choose([scheduled])
    assert scheduled.num_draft_tokens == 3


def test_confidences_are_translated_into_what_they_were_worth() -> None:
    """A drafter that says 0.9 and is right every third time is believed a third."""
    lookahead = AdaptiveLookahead(CostModel(costs("model")))
    chance = random.Random(1)
    drafting = sequence(8, 1, 10**6, 1)
    for _ in range(1000):
        hit = chance.random() < 1 / 3
        lookahead.estimates.observe(drafting, "", [0.9], 1, int(hit))
    assert lookahead.estimates.of(drafting, "", 0.9) == pytest.approx(1 / 3, abs=0.07)
    assert lookahead.estimates.of(drafting, "", 0.1) == pytest.approx(0.1, abs=0.05)


def test_a_lucky_sequence_is_told_from_its_drafters_record() -> None:
    lookahead = AdaptiveLookahead(CostModel(costs("model")))
    lucky, other = (sequence(8, 1, 10**6, 4, number) for number in (1, 2))
    for _ in range(200):
        lookahead.estimates.observe(lucky, "", [], 1, 1)
        lookahead.estimates.observe(other, "", [], 1, 0)
    [high], [low] = (lookahead.estimates.chances(s, 1) for s in (lucky, other))
    assert high > 0.8
    assert low < 0.2


def test_luck_fades_while_a_sequence_has_no_drafts() -> None:
    """Step by step it gets nearer to what its drafter's record says."""
    lookahead = AdaptiveLookahead(CostModel(costs("model")))
    unlucky, new = (sequence(8, 1, 10**6, 4, number) for number in (1, 2))
    for _ in range(10):
        lookahead.estimates.observe(new, "", [], 1, 1)
        lookahead.estimates.observe(unlucky, "", [], 1, 0)
    lookahead.forget(new)
    far = []
    for _ in range(60):
        [low], [usual] = (lookahead.estimates.chances(s, 1) for s in (unlucky, new))
        far.append(usual - low)
        lookahead.choose([ScheduledSequence(unlucky, 1, 0)])
    assert far[0] > 0.2
    assert far == sorted(far, reverse=True)
    assert far[-1] < 0.2 * far[0]
