"""Sample and match: a draft token is accepted exactly when the verifier would say it too.

The verifier's token at every position is sampled as plain decoding would sample it. Drafts are
kept while they equal it; the first that differs is replaced by it, and if all match, the last
position gives a bonus token. The output's law is the verifier's by construction, and with noise
keyed by position (`sampling.py`) even the tokens are those of plain decoding.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from random import Random
from typing import NamedTuple

from tandem.requests.logprobs import TokenLogprobs


class Verdict(NamedTuple):
    """What one sequence gains in a step: accepted drafts, then one token of the verifier's own.

    `logprobs` has an entry for each token if the request asked for them.
    """

    token_ids: list[int]
    num_accepted: int
    logprobs: Items[TokenLogprobs] = ()


def match(draft_ids: Items[int], verifier_ids: Items[int]) -> Verdict:
    """Compares `k` drafts with the verifier's `k + 1` tokens at the same positions."""
    assert len(verifier_ids) == len(draft_ids) + 1
    num_accepted = 0
    while num_accepted < len(draft_ids) and draft_ids[num_accepted] == verifier_ids[num_accepted]:
        num_accepted += 1
    return Verdict(list(verifier_ids[: num_accepted + 1]), num_accepted)


def toss(
    draft_ids: Items[int], verifier_ids: Items[int], rates: Items[float], coin: Random
) -> Verdict:
    """Keeps drafts by coin instead of by match: for benchmarks, the text is the drafter's.

    Args:
        rates: for each position, the share of rounds whose draft there is kept; 0 behind the last.
    """
    num_accepted = num_kept(rates[: len(draft_ids)], coin)
    kept = list(draft_ids[:num_accepted])
    return Verdict([*kept, verifier_ids[num_accepted]], num_accepted)


def num_kept(rates: Items[float], coin: Random) -> int:
    """How many drafts a coin keeps; see `toss`."""
    num_accepted, reached = 0, 1.0
    for rate in rates:
        if coin.random() * reached >= rate:
            break
        num_accepted, reached = num_accepted + 1, rate
    return num_accepted
