"""The n-gram drafter against a scan of the whole text in each round."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem import SamplingParams, Sequence
from tandem.drafters.drafter import DraftRequest
from tandem.drafters.ngram import NgramDrafter


def sequence(token_ids: list[int], number: int = 0) -> Sequence:
    return Sequence(
        id=number,
        token_ids=list(token_ids),
        num_prompt_tokens=1,
        params=SamplingParams(),
        seed=0,
        drafter="ngram",
        max_lookahead=8,
    )


def guesses(drafter: NgramDrafter, requests: list[DraftRequest]) -> list[list[int]]:
    return [draft.token_ids for draft in drafter.propose(requests)]


def scan(text: list[int], min_size: int, max_size: int, count: int) -> list[int]:
    """What follows the longest of the last 32 matches; the commonest of equals, then the latest."""
    suffix = text[-min_size:]
    ends = [end for end in range(min_size, len(text)) if text[end - min_size : end] == suffix]
    sizes = {}
    for end in ends[-32:] if len(text) >= min_size else []:
        limit = min(max_size, end)
        sizes[end] = max(s for s in range(min_size, limit + 1) if text[end - s : end] == text[-s:])
    if not sizes:
        return []
    best = [end for end, size in sizes.items() if size == max(sizes.values())]
    following = [text[end] for end in best]
    end = max(best, key=lambda end: (following.count(text[end]), end))
    text = list(text)
    start = len(text)
    for offset in range(count):
        text.append(text[end + offset])
    return text[start:]


@given(
    rounds=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=12),
    sizes=st.tuples(st.integers(1, 3), st.integers(0, 3)),
    count=st.integers(1, 8),
)
def test_guesses_equal_a_scan_of_the_whole_text(
    rounds: list[list[int]], sizes: tuple[int, int], count: int
) -> None:
    """Also when the text has grown by several tokens since the round before."""
    low, high = sizes[0], sizes[0] + sizes[1]
    drafter = NgramDrafter(low, high)
    growing = sequence([])
    for tokens in rounds:
        growing.token_ids += tokens
        (guess,) = guesses(drafter, [DraftRequest(growing, count)])
        assert guess == scan(growing.token_ids, low, high, count)


def test_a_loop_goes_on_for_as_long_as_is_asked() -> None:
    """The drafts themselves are read on, past the end of the text."""
    (guess,) = guesses(NgramDrafter(1, 3), [DraftRequest(sequence([5, 6, 7, 5, 6, 7]), 8)])
    assert guess == [5, 6, 7, 5, 6, 7, 5, 6]


@pytest.mark.parametrize("text", [[5], [5, 6], [5, 6, 7, 8]])
def test_nothing_is_guessed_for_a_new_suffix(text: list[int]) -> None:
    assert guesses(NgramDrafter(1, 3), [DraftRequest(sequence(text), 4)]) == [[]]


def test_the_latest_of_the_longest_matches_wins() -> None:
    drafter = NgramDrafter(1, 2)
    text = [1, 2, 3, 1, 2, 4, 2, 9, 1, 2]
    assert guesses(drafter, [DraftRequest(sequence(text), 1)]) == [[4]]


def test_sequences_do_not_mix() -> None:
    """Each looks up in its own text."""
    drafter = NgramDrafter(1, 2)
    one, other = sequence([1, 2, 1], 1), sequence([1, 3, 1], 2)
    requests = [DraftRequest(one, 1), DraftRequest(other, 1)]
    assert guesses(drafter, requests) == [[2], [3]]


def test_a_forgotten_sequence_leaves_nothing_to_its_successor() -> None:
    drafter = NgramDrafter(1, 2)
    guesses(drafter, [DraftRequest(sequence([5, 6, 7, 1, 2, 1]), 1)])
    drafter.forget(sequence([]))
    assert guesses(drafter, [DraftRequest(sequence([1, 9, 8, 7, 6, 1]), 1)]) == [[9]]


def test_proposing_leaves_the_text_alone() -> None:
    one = sequence([1, 2, 1, 2])
    guesses(NgramDrafter(1, 2), [DraftRequest(one, 8)])
    assert one.token_ids == [1, 2, 1, 2]


def test_the_commonest_continuation_wins() -> None:
    text = [1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2]
    assert guesses(NgramDrafter(1, 2), [DraftRequest(sequence(text), 1)]) == [[3]]


def test_other_requests_help_only_where_they_are_shared() -> None:
    for num_shared_tokens, guess in ((0, []), (100, [3, 4, 5])):
        drafter = NgramDrafter(2, 8, num_shared_tokens)
        ended = sequence([1, 2, 3, 4, 5], 1)
        guesses(drafter, [DraftRequest(ended, 3)])
        drafter.forget(ended)
        new = DraftRequest(sequence([7, 1, 2], 2), 3)
        assert guesses(drafter, [new]) == [guess]


def test_shared_texts_are_bounded() -> None:
    drafter = NgramDrafter(2, 8, num_shared_tokens=10)
    for number in range(5):
        ended = sequence([10 * number + offset for offset in range(5)], number)
        guesses(drafter, [DraftRequest(ended, 3)])
        drafter.forget(ended)
    known = [
        guesses(drafter, [DraftRequest(sequence([10 * n, 10 * n + 1], 9), 1)]) for n in range(5)
    ]
    assert known == [[[]], [[]], [[]], [[32]], [[42]]]
