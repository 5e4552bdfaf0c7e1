"""What a round decides on the device: which drafts are verified, where each row lies, what matches.

Plain torch operations whose shapes don't depend on what they compute, so that a graph can hold
them. Tables have a line for each place of the batch; places that nobody has stand at its end, with
no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.lookahead.estimates import NUM_BINS


def choose(
    gains: Tensor, chances: Tensor, confidences: Tensor, limits: Tensor, num_rows: Tensor
) -> Tensor:
    """How many drafts of each sequence are verified: the most valuable of all.

    Args:
        gains: expected tokens of each draft, `[num_places, max_drafts]`; negative where confidences
            tell.
        chances: that a guess is accepted, by its confidence, `[num_places, NUM_BINS]`.
        confidences: of guesses, `[num_places, max_drafts]`.
        limits: drafts that there are, `[num_places]`.
        num_rows: drafts to be verified at most, a number.

    Returns:
        `[num_places]`.
    """
    num_places, max_drafts = gains.shape
    bins = (confidences.nan_to_num() * NUM_BINS).long().clamp(0, NUM_BINS - 1)
    made = chances.gather(1, bins).cumprod(dim=1)
    values = torch.where(gains < 0, made, gains)
    exists = torch.arange(max_drafts, device=gains.device) < limits.unsqueeze(1)
    # By depth first, so that of equal ones none comes before the one that it stands behind.
    flat = values.where(exists, -1.0).t().flatten()
    order = flat.argsort(descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(0, order, torch.arange(len(flat), device=gains.device))
    is_kept = (ranks < num_rows) & (flat >= 0)
    return is_kept.view(max_drafts, num_places).sum(dim=0)


@dataclass(frozen=True)
class Layout:
    """Where everything lies in a packed row.

    Attributes:
        token_ids, positions: of the row, `[1, num_rows]`.
        slots: of the row in each group, `[num_rows]`; a scratch slot behind the last token.
        spans: of each group; see `PackedBatch.spans`.
        sampled: rows whose logits are wanted, `[num_sampled]`.
        places: whose they are, `[num_sampled]`.
        offsets: behind how many drafts, `[num_sampled]`.
        first: of the sampled rows, the first of each place.
        owners: whose slot each row belongs to, `[num_rows]`.
    """

    token_ids: Tensor
    positions: Tensor
    slots: list[Tensor]
    spans: list[Tensor]
    sampled: Tensor
    places: Tensor
    offsets: Tensor
    first: Tensor
    owners: Tensor


@dataclass(frozen=True)
class Batch:
    """Who is in a round; a line for each place.

    Attributes:
        slot: whose state it is, `[num_places]`.
        start: tokens whose K/V are in the cache.
        num_known: tokens that the pass computes besides drafts.
        yields: 1 where a token is sampled behind them, else 0.
        known: the known tokens of all, one behind the other, `[max_tokens]`.
    """

    slot: Tensor
    start: Tensor
    num_known: Tensor
    yields: Tensor
    known: Tensor


def lay_out(
    batch: Batch,
    drafts: Tensor,
    num_drafts: Tensor,
    tables: Tensor,
    block_size: int,
    scratch: Items[int],
    num_rows: int,
    num_sampled: int,
) -> Layout:
    """Lays known tokens and drafts of all sequences in one row of `num_rows`, without gaps.

    Args:
        drafts: `[num_places, max_drafts]`.
        num_drafts: that are verified, `[num_places]`.
        tables: block tables of each group and slot, `[num_groups, num_slots, max_blocks]`; the last
            slot is nobody's.
        scratch: a slot of each group for what lies behind the last token.
    """
    counts = batch.num_known + num_drafts
    place, offset, first, exists = _deal(counts, num_rows)
    of_known = batch.num_known.cumsum(0) - batch.num_known
    known = batch.known[(of_known[place] + offset).clamp(max=len(batch.known) - 1)]
    depth = offset - batch.num_known[place]
    guesses = drafts[place, depth.clamp(0, drafts.shape[1] - 1)]
    token_ids = torch.where(depth < 0, known, guesses).where(exists, 0)
    positions = (batch.start[place] + offset).where(exists, 0)
    slot, block = batch.slot[place], positions // block_size
    slots = [
        (table[slot, block].long() * block_size + positions % block_size).where(exists, unused)
        for table, unused in zip(tables, scratch, strict=True)
    ]
    shape = torch.stack([first, counts, batch.start + counts], dim=1)
    spans = [
        torch.cat([shape, begins.unsqueeze(1)], dim=1).int()
        for begins in table_places(batch.slot, tables)
    ]
    behind = batch.yields * (1 + num_drafts)
    owner, offsets, first_sampled, is_sampled = _deal(behind, num_sampled)
    rows = first[owner] + batch.num_known[owner] - 1 + offsets
    return Layout(
        token_ids=token_ids.unsqueeze(0),
        positions=positions.unsqueeze(0),
        slots=slots,
        spans=spans,
        sampled=rows.where(is_sampled, 0),
        places=owner,
        offsets=offsets,
        first=first_sampled,
        owners=slot.where(exists, tables.shape[1] - 1),
    )


def table_places(slot: Tensor, tables: Tensor) -> list[Tensor]:
    """Where the block tables of slots begin in each group, if all lie one behind the other."""
    num_groups, num_slots, max_blocks = tables.shape
    return [(group * num_slots + slot) * max_blocks for group in range(num_groups)]


def _deal(counts: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Deals rows to places, `counts` to each.

    Returns:
        For each of `num_rows`, whose it is, the how manieth of its rows, and whether it is anyone's
        at all; before the last of these the first row of each place.
    """
    ends = counts.cumsum(0)
    first = ends - counts
    rows = torch.arange(num_rows, device=counts.device)
    place = torch.searchsorted(ends, rows, right=True).clamp(max=len(counts) - 1)
    return place, rows - first[place], first, rows < ends[-1]


def accepted(verified: Tensor, drafts: Tensor, num_drafts: Tensor, coins: Tensor) -> Tensor:
    """How many drafts of each sequence equal the verifier's tokens, `[num_places]`.

    Args:
        verified: the verifier's tokens, `[num_places, max_drafts + 1]`.
        drafts: `[num_places, max_drafts]`.
        num_drafts: of these, how many there are, `[num_places]`.
        coins: how many a coin keeps, where it decides; else negative.
    """
    max_drafts = drafts.shape[1]
    exists = torch.arange(max_drafts, device=drafts.device) < num_drafts.unsqueeze(1)
    equal = (verified[:, :max_drafts] == drafts) & exists
    matching = equal.long().cumprod(dim=1).sum(dim=1)
    return torch.where(coins < 0, matching, coins.minimum(num_drafts))
