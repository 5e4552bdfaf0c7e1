"""The three programs of a round on the device: draft, verify and accept.

Each launches the same whatever tensors hold, for one size. For the sizes of service there are
graphs, made at load; any other runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from tandem.drafters.mtp import MTPDrafter
from tandem.models.attention import PackedRow
from tandem.models.head import take_states
from tandem.models.packed_pass import row_logits
from tandem.models.verifier import Verifier
from tandem.rounds.adjusting import adjust
from tandem.rounds.layout import accepted, choose, lay_out, table_places
from tandem.rounds.state import SAMPLING, DeviceState
from tandem.sampling.sample import Guess
from tandem.wing import RoundTools


class PassSize(NamedTuple):
    """The shape of a pass: its rows, and how many of them are sampled."""

    num_rows: int
    num_sampled: int


class RoundSize(NamedTuple):
    """The shape of a round of drafting: whose it is, and for how many places how many guesses."""

    model: int
    num_places: int
    depth: int


class Verified(NamedTuple):
    """What a pass leaves for accepting, and for scoring; see `Layout` for the last three."""

    states: Tensor  # [num_sampled + num_scored, hidden_size]
    logits: Tensor | None  # [num_sampled + num_scored, vocab_size], if the head is not deferred
    drafts: Tensor  # [num_places, max_drafts]
    num_drafts: Tensor
    places: Tensor
    offsets: Tensor
    first: Tensor


def buckets(largest: int) -> list[int]:
    """Sizes that graphs are made for: two for each doubling, up to `largest`."""
    sizes = {largest}
    power = 1
    while power < largest:
        sizes |= {power, min(largest, power * 3 // 2)}
        power *= 2
    return sorted(sizes)


class Programs:
    """What a round launches."""

    def __init__(
        self,
        verifier: Verifier,
        models: Items[MTPDrafter],
        state: DeviceState,
        tools: RoundTools,
        max_rows: int,
    ) -> None:
        """Takes what they compute with.

        Args:
            models: that draft on the device.
            max_rows: of a pass that has a graph.
        """
        self._verifier = verifier
        self._models = models
        self._state = state
        self._tools = tools
        self._row_sizes, self._place_sizes = buckets(max_rows), buckets(state.num_slots)
        self._verify: dict[PassSize, Callable[[], Verified]] = {}
        # With requests that change logits, and without.
        self._accept: dict[tuple[PassSize, bool], Callable[[], None]] = {}
        self._draft: dict[RoundSize, Callable[[], None]] = {}

    @torch.inference_mode()
    def capture(self) -> None:
        """Makes the graphs, the largest first: the others find its memory free."""
        rounds = [
            RoundSize(model, size, depth)
            for model, _ in enumerate(self._models)
            for size in reversed(self._place_sizes)
            for depth in range(self._state.max_drafts, 0, -1)
        ]
        # Without a terminal there is no bar.
        with tqdm(
            total=len(self._row_sizes) + len(rounds), desc="CUDA graphs", disable=None
        ) as bar:
            for num_rows in reversed(self._row_sizes):
                size = PassSize(num_rows, num_rows)
                verify = self._tools.graph(partial(self._run_verify, size))
                self._verify[size] = verify
                verified = verify()
                for adjusts in (True, False):
                    accept = partial(self._run_accept, verified, adjusts=adjusts)
                    self._accept[size, adjusts] = self._tools.graph(accept)
                bar.update()
            for each in rounds:
                self._draft[each] = self._tools.graph(partial(self._run_draft, each))
                bar.update()

    def pass_size(self, num_rows: int, num_sampled: int) -> PassSize:
        """The smallest size for so many rows; exactly so many beyond the largest graph."""
        for size in self._row_sizes:
            if size >= num_rows:
                return PassSize(size, size)
        return PassSize(num_rows, max(1, num_sampled))

    def draft(self, model: int, num_places: int, depth: int) -> None:
        """Lets a model guess for those of the first places that want it to.

        Writes `guesses` and `confidences` of the state.
        """
        count = next(size for size in self._place_sizes if size >= num_places)
        size = RoundSize(model, count, depth)
        (self._draft.get(size) or partial(self._run_draft, size))()

    def verify(self, size: PassSize, scored: Items[int] = ()) -> Verified:
        """Chooses drafts, lays out the row, and runs the verifier over it.

        Args:
            scored: more rows whose states are wanted; then there is no graph.
        """
        run = None if scored else self._verify.get(size)
        return (run or partial(self._run_verify, size, scored))()

    def accept(self, size: PassSize, verified: Verified, *, adjusts: bool) -> None:
        """Samples and matches, keeps states for the next round, and writes the results.

        Args:
            adjusts: whether requests change logits.
        """
        # A graph reads what the graph of its pass has left.
        has_graph = len(verified.states) == size.num_sampled
        run = self._accept.get((size, adjusts)) if has_graph else None
        (run or partial(self._run_accept, verified, adjusts=adjusts))()

    def _run_draft(self, size: RoundSize) -> None:
        state, count = self._state, size.num_places
        state.take_changes()
        batch, table = state.batch(count), state.inputs.device
        is_asked = table["drafter"][:count] == size.model
        places = torch.arange(count, device=is_asked.device)
        shape = torch.stack([places, is_asked.long(), batch.start], dim=1)
        spans = [
            torch.cat([shape, begins.unsqueeze(1)], dim=1).int()
            for begins in table_places(batch.slot, state.tables)
        ]
        packed = self._row(spans, causal=False)
        tokens, hidden = table["last"][:count], state.hidden[batch.slot]
        positions = batch.start.unsqueeze(0)
        model = self._models[size.model]
        for step in range(size.depth):
            draw = partial(self._draw, batch.start + 1 + step)
            guess, hidden = model.advance(tokens, hidden, positions, draw, packed)
            tokens = guess.token_ids
            for kept, new in ((state.guesses, tokens), (state.confidences, guess.confidences)):
                column = kept[:count, step]
                column.copy_(torch.where(is_asked, new.to(kept.dtype), column))

    def _run_verify(self, size: PassSize, scored: Items[int] = ()) -> Verified:
        state, cache = self._state, self._verifier.cache
        state.take_changes()
        count, table = min(size.num_rows, state.num_slots), state.inputs.device
        is_guessed = (table["drafter"][:count] >= 0).unsqueeze(1)
        drafts = torch.where(is_guessed, state.guesses[:count], table["drafts"][:count])
        num_drafts = choose(
            table["gains"][:count],
            table["chances"][:count],
            state.confidences[:count],
            table["limit"][:count],
            table["num_rows"],
        )
        layout = lay_out(
            state.batch(count),
            drafts,
            num_drafts,
            state.tables,
            cache.block_size,
            cache.scratch_slots,
            *size,
        )
        tokens, positions = layout.token_ids[0], layout.positions[0]
        state.history[layout.owners, positions] = tokens.int()
        model = self._verifier.model
        logits = row_logits(
            model,
            cache,
            self._row(layout.spans, causal=True),
            layout.slots,
            layout.token_ids,
            layout.positions,
            torch.cat([layout.sampled, layout.sampled.new_tensor(scored)])
            if scored
            else layout.sampled,
        )
        states = take_states(model)[0]
        made = None if self._verifier.head.is_deferred else logits
        where = layout.places, layout.offsets, layout.first
        return Verified(states, made, drafts, num_drafts, *where)

    def _run_accept(self, verified: Verified, *, adjusts: bool) -> None:
        states, logits, drafts, num_drafts, places, offsets, first = verified
        states = states[: len(places)]
        state, count = self._state, len(num_drafts)
        table = state.inputs.device
        head = self._verifier.head
        made = head.logits(states) if logits is None else logits[: len(places)]
        positions = (table["start"] + table["num_known"])[places] + offsets
        if adjusts:
            own = {name: each[places] for name, each in state.adjustments.device.items()}
            made = made.clone()
            adjust(made, positions, state.history[table["slot"][places]], own)
        chosen = self._choose(made, positions, places)
        depths = torch.arange(state.max_drafts + 1, device=states.device)
        rows = (first.unsqueeze(1) + depths).clamp(max=len(states) - 1)
        tokens = chosen[rows]
        num_accepted = accepted(tokens, drafts, num_drafts, table["coin"][:count])
        last = rows.gather(1, num_accepted.unsqueeze(1)).squeeze(1)
        slots = torch.where(table["yields"][:count] > 0, table["slot"][:count], state.num_slots)
        state.hidden.index_copy_(0, slots, states[last])
        for name, values in (
            ("tokens", tokens),
            ("num_drafts", num_drafts),
            ("drafts", drafts),
            ("confidences", state.confidences[:count]),
        ):
            state.results.device[name][:count].copy_(values)

    def _row(self, spans: Items[Tensor], *, causal: bool) -> PackedRow:
        cache = self._verifier.cache
        return PackedRow(
            self._tools.attend,
            spans,
            self._state.cells,
            cache.block_size,
            cache.windows,
            causal=causal,
        )

    def _choose(
        self, logits: Tensor, positions: Tensor, places: Tensor, token_ids: Tensor | None = None
    ) -> Tensor:
        """The candidate that each row samples; -1 where logits are no numbers."""
        columns = [self._state.inputs.device[name][places] for name in SAMPLING]
        seeds, temperatures, top_k, top_p, log_min_p = columns
        return self._tools.choose(
            logits,
            seeds,
            positions,
            temperatures.float(),
            top_k,
            top_p.float(),
            log_min_p.float(),
            token_ids=token_ids,
        )

    def _draw(self, positions: Tensor, logits: Tensor, token_ids: Tensor | None) -> Guess:
        """As `tandem.sampling.sample.guess`."""
        places = torch.arange(len(logits), device=logits.device)
        chosen = self._choose(logits, positions, places, token_ids).clamp(min=0).unsqueeze(1)
        temperatures = self._state.inputs.device["temperature"][: len(logits)].float()
        scores = logits.float() / temperatures.where(temperatures > 0, 1).unsqueeze(1)
        sure = (scores.gather(1, chosen) - scores.logsumexp(dim=-1, keepdim=True)).exp()
        found = chosen if token_ids is None else token_ids.gather(1, chosen)
        return Guess(found.squeeze(1), sure.squeeze(1))
