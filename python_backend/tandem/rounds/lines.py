"""What the host writes of a batch before it is sent: a line for each sequence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Items

from tandem.acceptance.match import num_kept
from tandem.acceptance.verdicts import coin_of
from tandem.lookahead.lookahead import Lookahead
from tandem.requests.sequence import ScheduledSequence
from tandem.rounds.state import DeviceState
from tandem.sampling.noise import signed

# In the lines of nobody.
_NOBODY = {"drafter": -1, "coin": -1}


def write_lines(
    state: DeviceState,
    order: Items[ScheduledSequence],
    slots: Items[int],
    models: Mapping[ScheduledSequence, int],
    lookahead: Lookahead,
    rates: Items[float],
) -> None:
    """Writes who takes part in a round.

    Args:
        order: the batch by place.
        slots: of each place.
        models: which model is to draft, for whom one is.
        rates: `synthetic_acceptance_rates`.
    """
    host, count = state.inputs.host, len(order)
    sequences = [s.sequence for s in order]
    params = [s.params for s in sequences]
    columns: dict[str, Items[float]] = {
        "slot": slots,
        "start": [s.num_computed for s in sequences],
        "num_known": [s.num_tokens for s in order],
        "yields": [s.yields_token for s in order],
        "last": [s.token_ids[-1] for s in sequences],
        "drafter": [models.get(s, -1) for s in order],
        "limit": [s.num_draft_tokens for s in order],
        "coin": [_coin(s, rates) for s in order],
        "seed": [signed(s.seed) for s in sequences],
        "temperature": [0.0 if p.is_greedy else p.temperature for p in params],
        "top_k": [p.top_k for p in params],
        "top_p": [p.top_p for p in params],
        "log_min_p": [math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params],
    }
    nobody = {"slot": state.num_slots, **_NOBODY}
    for name, values in columns.items():
        host[name][:count] = values
        host[name][count:] = nobody.get(name, 0)
    known: list[int] = []
    for place, scheduled in enumerate(order):
        start = scheduled.sequence.num_computed
        known += scheduled.sequence.token_ids[start : start + scheduled.num_tokens]
        if scheduled.num_draft_tokens > 0:
            _write_drafts(state, place, scheduled, lookahead)
    host["known"][: len(known)] = known


def _coin(scheduled: ScheduledSequence, rates: Items[float]) -> int:
    if not rates or scheduled.is_forced:
        return -1
    return num_kept(rates, coin_of(scheduled.sequence))


def _write_drafts(
    state: DeviceState, place: int, scheduled: ScheduledSequence, lookahead: Lookahead
) -> None:
    host, draft_ids = state.inputs.host, scheduled.draft_ids
    host["drafts"][place, : len(draft_ids)] = draft_ids
    gains = lookahead.gains(scheduled)
    if gains is None:
        host["gains"][place] = -1
        host["chances"][place] = lookahead.chances(scheduled.sequence)
    else:
        host["gains"][place, : len(gains)] = gains
