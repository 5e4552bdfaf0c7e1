"""How likely the verifier finds a token."""

from __future__ import annotations

from typing import NamedTuple


class TokenLogprobs(NamedTuple):
    """A token's log probability, its rank from 1, and the likeliest tokens with theirs."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]
