"""From logits to a token, under noise keyed by (seed, position, token).

A token is `argmax(score + gumbel)` over the tokens that temperature, top-k, top-p and min-p leave
(the Gumbel-max trick). The noise of a token at a position depends on nothing but the request's
seed, so any batch, any drafter and any lookahead sample the same token from the same logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tandem.requests.params import SamplingParams
from tandem.sampling.noise import BLOCK, block_gumbel, gumbel, signed, splitmix64
from tandem.wing import wing_of

# How many of the largest scores are sorted at first, and how many times more where they don't do.
_FIRST_SORTED, _GROWTH = 128, 4


class Draw(NamedTuple):
    """One token to sample: whose parameters, which seed, and the token's index in its sequence."""

    params: SamplingParams
    seed: int
    position: int


@dataclass(frozen=True)
class _Rows:
    """The draws that need noise, as columns `[num_rows, 1]`."""

    index: Tensor
    key: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    log_min_p: Tensor

    @classmethod
    def of(cls, draws: Items[Draw], device: torch.device) -> _Rows | None:
        index = [row for row, draw in enumerate(draws) if not draw.params.is_greedy]
        if not index:
            return None
        chosen = [draws[row] for row in index]

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device).unsqueeze(1)

        def integers(values: list[int]) -> Tensor:
            return torch.tensor(values, device=device).unsqueeze(1)

        return cls(
            index=torch.tensor(index, device=device),
            key=splitmix64(
                integers([signed(draw.seed) for draw in chosen]),
                integers([draw.position for draw in chosen]),
            ),
            temperature=column([draw.params.temperature for draw in chosen]),
            top_k=integers([draw.params.top_k for draw in chosen]),
            top_p=column([draw.params.top_p for draw in chosen]),
            log_min_p=column([_log(draw.params.min_p) for draw in chosen]),
        )


def _log(share: float) -> float:
    return math.log(share) if share > 0 else -math.inf


def sample(logits: Tensor, draws: Items[Draw], token_ids: Tensor | None = None) -> Tensor:
    """Samples one token a row.

    Args:
        logits: `[num_rows, num_candidates]`, any float type.
        draws: one for each row.
        token_ids: which token each candidate is, `[num_rows, num_candidates]`; candidate i is
            token i when not given.

    Returns:
        Token ids, `[num_rows]`.
    """
    chosen = _choose(logits, draws, token_ids)
    return chosen if token_ids is None else _at(token_ids, chosen)


class Guess(NamedTuple):
    """Tokens that a drafter sampled, and the probabilities that it gave them; `[num_rows]`."""

    token_ids: Tensor
    confidences: Tensor


def guess(logits: Tensor, draws: Items[Draw], token_ids: Tensor | None = None) -> Guess:
    """Samples like `sample`, and says how likely each token was under its row's temperature."""
    chosen = _choose(logits, draws, token_ids)
    temperatures = [1.0 if draw.params.is_greedy else draw.params.temperature for draw in draws]
    scores = logits.float() / torch.tensor(temperatures, device=logits.device).unsqueeze(1)
    confidences = (_at(scores, chosen) - scores.logsumexp(dim=-1)).exp()
    return Guess(chosen if token_ids is None else _at(token_ids, chosen), confidences)


def _at(values: Tensor, candidate: Tensor) -> Tensor:
    """One value of each row, `[num_rows]`."""
    return values.gather(1, candidate.unsqueeze(1)).squeeze(1)


def _choose(logits: Tensor, draws: Items[Draw], token_ids: Tensor | None) -> Tensor:
    """The candidate that each row samples, `[num_rows]`."""
    rows = _Rows.of(draws, logits.device)
    if rows is not None and len(rows.index) == len(draws):
        return _sample_rows(logits, rows, token_ids)
    chosen, _ = largest(logits)
    if rows is not None:
        ids = None if token_ids is None else token_ids[rows.index]
        chosen[rows.index] = _sample_rows(logits[rows.index], rows, ids)
    return chosen


def _sample_rows(logits: Tensor, rows: _Rows, token_ids: Tensor | None) -> Tensor:
    """The candidate, `[num_rows]`, with the largest score under noise."""
    # Candidates go in groups whose noise has a known bound: the blocks of a whole vocabulary.
    if token_ids is None:
        groups = _blocks(logits)
        limit, _ = block_gumbel(rows.key, torch.arange(groups.shape[1], device=logits.device))
    else:
        groups = logits.unsqueeze(-1)
        limit, _ = block_gumbel(rows.key, token_ids // BLOCK)

    def token_of(row: Tensor, candidate: Tensor) -> Tensor:
        return candidate if token_ids is None else token_ids[row, candidate]

    group_best = groups.amax(dim=-1).float() / rows.temperature  # [num_rows, num_groups]
    best, best_group = group_best.max(dim=-1)
    every_row = torch.arange(len(best), device=logits.device)
    best_index = best_group * groups.shape[2] + groups[every_row, best_group].argmax(dim=-1)
    noise = gumbel(rows.key, token_of(every_row, best_index).unsqueeze(1))
    # What can't catch up with the likeliest token, whatever its noise, needs none.
    to_beat = best.unsqueeze(1) + noise
    floor = _floor(groups, group_best, rows)
    row, group = ((group_best >= floor) & (group_best + limit >= to_beat)).nonzero(as_tuple=True)
    scores = groups[row, group].float() / rows.temperature[row]  # [num_live_groups, group_size]
    live = (scores >= floor[row]) & (scores + limit[row, group].unsqueeze(1) >= to_beat[row])
    index, offset = live.nonzero(as_tuple=True)
    row, candidate = row[index], group[index] * groups.shape[2] + offset
    perturbed = scores[index, offset] + gumbel(rows.key[row, 0], token_of(row, candidate))
    return _argmax_by_row(perturbed, row, candidate, len(best))


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest candidate of each row, the first of equals, and its logit; `[num_rows]`.

    By way of the blocks' maxima, which a CPU finds some twenty times faster than their place. A NaN
    is larger than all numbers.
    """
    blocks = _blocks(logits)
    values, block = blocks.amax(dim=-1).max(dim=-1)
    offset = blocks[torch.arange(len(block), device=logits.device), block].argmax(dim=-1)
    return block * BLOCK + offset, values


def _blocks(logits: Tensor) -> Tensor:
    """The logits as `[num_rows, num_blocks, BLOCK]`; what the last block lacks is -infinity."""
    missing = -logits.shape[1] % BLOCK
    if missing:
        logits = torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))
    return logits.view(len(logits), -1, BLOCK)


def _argmax_by_row(values: Tensor, row: Tensor, candidate: Tensor, num_rows: int) -> Tensor:
    """The candidate with each row's largest value, `[num_rows]`; the first of equals.

    A row without any, whose logits were not numbers, gets candidate 0.
    """
    largest = values.new_full((num_rows,), float("-inf")).scatter_reduce(0, row, values, "amax")
    winners = values == largest[row]
    first = torch.zeros(num_rows, dtype=torch.long, device=values.device)
    return first.scatter_reduce(0, row[winners], candidate[winners], "amin", include_self=False)


def _floor(groups: Tensor, group_best: Tensor, rows: _Rows) -> Tensor:
    """The lowest score, `[num_rows, 1]`, that top-k, top-p and min-p let through; ties stay in.

    The order is temperature, top-k, top-p on what top-k left, min-p, as in transformers. Of the
    scores only the largest are sorted: some first, and more in the rows where these don't tell.
    """
    num_candidates = groups.shape[1] * groups.shape[2]
    best = group_best.amax(dim=-1, keepdim=True)
    floor = best + rows.log_min_p
    is_limited = (rows.top_k > 0) & (rows.top_k < num_candidates)
    has_nucleus = rows.top_p < 1
    needs_mass = _places(has_nucleus & ~is_limited)
    mass = torch.ones_like(best)
    if len(needs_mass):
        mass[needs_mass] = wing_of(groups.device).exp_sums(
            groups.flatten(1), needs_mass, rows.temperature[needs_mass], best[needs_mass]
        )
    left, size = _places(has_nucleus | is_limited), min(_FIRST_SORTED, num_candidates)
    while len(left):
        scores = _largest(groups, group_best, left, size).float() / rows.temperature[left]
        limited, top_p = is_limited[left], rows.top_p[left]
        kth = scores.gather(1, rows.top_k[left].clamp(1, size) - 1).where(limited, -torch.inf)
        chances = (scores - best[left]).exp().where(scores >= kth, 0)
        total = chances.sum(dim=-1, keepdim=True).where(limited, mass[left])
        reached = chances.cumsum(dim=-1) >= top_p * total
        # The nucleus ends with the first token that reaches top_p.
        last = (~reached).sum(dim=-1, keepdim=True).clamp_(max=size - 1)
        lowest = kth.maximum(scores.gather(1, last).where(has_nucleus[left], -torch.inf))
        # All that tie with the last that top-k leaves must be among the sorted. Behind a forbidden
        # one there are only others.
        lowest_sorted = scores[:, -1:]
        is_known = torch.where(limited, lowest_sorted < kth, reached[:, -1:])
        is_known = (is_known | (lowest_sorted == -torch.inf)).squeeze(1)
        if size == num_candidates:
            is_known = torch.ones_like(is_known)
        known = left[is_known]
        floor[known] = floor[known].maximum(lowest[is_known])
        left, size = left[~is_known], min(size * _GROWTH, num_candidates)
    return floor


def _places(column: Tensor) -> Tensor:
    """The rows of a column that are true."""
    return column.squeeze(1).nonzero().squeeze(1)


def _largest(groups: Tensor, group_best: Tensor, rows: Tensor, count: int) -> Tensor:
    """The `count` largest logits of each of some rows in descending order.

    They all lie in the `count` groups with the largest maxima, which is far less to sort than a
    whole vocabulary.
    """
    if count * 2 > groups.shape[1]:
        return groups[rows].flatten(1).topk(count, dim=-1).values
    top = group_best[rows].topk(count, dim=-1).indices
    return groups[rows.unsqueeze(1), top].flatten(1).topk(count, dim=-1).values
