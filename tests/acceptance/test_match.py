"""Sample and match, case by case."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.acceptance.match import match, toss


@pytest.mark.parametrize(
    ("drafts", "verifier", "token_ids", "num_accepted"),
    [
        ([], [7], [7], 0),
        ([7], [7, 8], [7, 8], 1),
        ([6], [7, 8], [7], 0),
        ([1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4], 3),
        ([1, 2, 3], [1, 9, 3, 4], [1, 9], 1),
        ([1, 2, 3], [9, 2, 3, 4], [9], 0),
        ([1, 2, 3], [1, 2, 9, 4], [1, 2, 9], 2),
    ],
)
def test_match_ends_with_the_first_token_that_differs(
    drafts: list[int], verifier: list[int], token_ids: list[int], num_accepted: int
) -> None:
    verdict = match(drafts, verifier)
    assert verdict.token_ids == token_ids
    assert verdict.num_accepted == num_accepted


@given(st.data())
def test_match_returns_what_plain_decoding_would_say(data: st.DataObject) -> None:
    """All tokens are the verifier's, one more than accepted, and each but the last was drafted."""
    tokens = st.integers(0, 2)
    drafts = data.draw(st.lists(tokens, max_size=8))
    verifier = data.draw(
        st.lists(tokens, min_size=len(drafts) + 1, max_size=len(drafts) + 1), label="verifier"
    )
    ids, accepted, _ = match(drafts, verifier)
    assert ids == verifier[: accepted + 1]
    assert ids[:-1] == drafts[:accepted]
    assert accepted == len(drafts) or drafts[accepted] != verifier[accepted]


def test_match_needs_one_token_of_the_verifier_more() -> None:
    with pytest.raises(AssertionError):
        match([1, 2], [1, 2])


def test_by_coin_each_position_is_kept_as_often_as_asked() -> None:
    coin = Random(0)
    verdicts = [toss([1, 2, 3, 4], [9, 9, 9, 9, 9], [0.8, 0.4, 0.4], coin) for _ in range(4000)]
    for position, rate in enumerate([0.8, 0.4, 0.4, 0.0]):
        share = sum(v.num_accepted > position for v in verdicts) / len(verdicts)
        assert share == pytest.approx(rate, abs=0.03)
    for verdict in verdicts:
        assert verdict.token_ids == [*[1, 2, 3, 4][: verdict.num_accepted], 9]
