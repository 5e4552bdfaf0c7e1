"""How far to draft: never past what the sequence can still use."""

from __future__ import annotations

import pytest

from tandem import SamplingParams, Sequence
from tandem.lookahead import lookahead


def sequence(num_prompt: int, num_output: int, max_tokens: int, limit: int) -> Sequence:
    return Sequence(
        id=0,
        token_ids=[9] * (num_prompt + num_output),
        num_prompt_tokens=num_prompt,
        params=SamplingParams(max_tokens=max_tokens),
        seed=0,
        drafter="ngram",
        max_lookahead=limit,
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
def test_lookahead_leaves_room_for_the_verifiers_own_token(
    num_output: int, max_tokens: int, max_model_len: int, expected: int
) -> None:
    assert lookahead(sequence(10, num_output, max_tokens, 4), max_model_len) == expected


def test_lookahead_is_zero_without_a_drafter() -> None:
    assert lookahead(sequence(10, 1, 100, 0), 100) == 0


def test_lookahead_is_never_negative() -> None:
    assert lookahead(sequence(10, 5, 5, 4), 15) == 0
