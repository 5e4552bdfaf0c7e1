"""How far to draft: never past what a sequence can use, and only where it pays."""

from __future__ import annotations

import random

import pytest

from made_up_costs import costs
from made_up_service import LIMIT, NUM_TOKENS, Service, sequence
from tandem.lookahead.adaptive import AdaptiveLookahead
from tandem.lookahead.costs import CostModel
from tandem.lookahead.lookahead import Lookahead, draft_limit
from tandem.requests.sequence import Draft, ScheduledSequence


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
