"""Measures what drafting and verifying cost here, in a short sweep when the engine loads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice
from statistics import median, median_high
from typing import TypeVar

import torch

from tandem.acceptance.match import Verdict
from tandem.drafter_config import NO_DRAFTER
from tandem.drafters.drafter import Drafter
from tandem.lookahead.costs import Costs, DraftCosts
from tandem.lookahead.curve import Curve
from tandem.models.verifier import Verifier, VerifierOutput
from tandem.requests.params import SamplingParams
from tandem.requests.sequence import Draft, ScheduledSequence, Sequence
from tandem.rounds.round import Round
from tandem.scheduler import Scheduler
from tandem.wing import wing_of

_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_SEQUENCES = (1, 2, 4, 8, 16, 32, 64)
_CONTEXT = 64
_REPETITIONS = 4
# What contradicts other figures by so much is looked at again, so many times at most.
_DOUBTFUL, _MORE_LOOKS = 1.1, 3
_GUESSES = 3
# Rows of a sequence, where there are enough sequences.
_ROWS_EACH = 4
# Sequences of one row each, against as many rows of fewer.
_MAX_SPREAD = 8
_NUM_DRAFTS = 8

T = TypeVar("T")


class Calibration:
    """Runs passes and rounds over made-up sequences; the engine must be idle."""

    def __init__(
        self,
        verifier: Verifier,
        drafters: Mapping[str, Drafter],
        scheduler: Scheduler,
        round_: Round,
    ) -> None:
        self._drafters = drafters
        self._scheduler = scheduler
        self._round = round_
        model = verifier.model
        self.wing = wing_of(model.device)
        self._drafts: list[int] = []
        self._num_made = 0
        self._spreads: list[float] = []
        self._vocab_size: int = model.config.get_text_config().vocab_size

    @torch.inference_mode()
    def measure(self) -> Costs:
        """Measures every cost; see `Costs`."""
        with self._sequences() as sequences:
            verify, sequence = self._verify_costs(sequences)
            return Costs(
                verify=verify,
                sequence=sequence,
                prompt_token=self._prompt_token_cost(sequences[0]),
                draft={name: self._draft_costs(name, sequences) for name in self._drafters},
                spread=median(self._spreads),
                measured_at=time.time(),
            )

    @property
    def _limit(self) -> int:
        """Tokens of the longest sequence that there may be and whose K/V all fit at once."""
        pool = self._scheduler.pool
        num_blocks = min(blocks.num_blocks for blocks in pool.blocks)
        return min(self._scheduler.max_model_len, num_blocks * pool.block_size)

    @contextmanager
    def _sequences(self) -> Iterator[list[Sequence]]:
        """Decoding sequences, as many as may run and find room."""
        scheduler = self._scheduler
        limit = self._limit
        context = min(_CONTEXT, limit // 2)
        # So that all of them together have room for the largest pass.
        num_rows = max(_ROWS_EACH, -(-_ROWS[-1] // scheduler.max_num_seqs))
        room = min(limit, context + num_rows)
        text = self._write(context)
        self._drafts = text[context + 1 :] or text
        sequences: list[Sequence] = []
        try:
            for _ in range(min(scheduler.max_num_seqs, _SEQUENCES[-1])):
                sequence = self._make(text[:context], SamplingParams(temperature=0.0))
                if not scheduler.pool.grow(sequence, room):
                    break
                sequences.append(sequence)
                self._prefill(sequence)
                sequence.token_ids.append(text[context])
            yield sequences
        finally:
            for sequence in sequences:
                scheduler.pool.shrink(sequence, 0)
                for drafter in self._drafters.values():
                    drafter.forget(sequence)

    def _make(self, token_ids: list[int], params: SamplingParams) -> Sequence:
        self._num_made += 1
        return Sequence(
            id=-self._num_made,
            token_ids=list(token_ids),
            num_prompt_tokens=len(token_ids),
            params=params,
            seed=0,
            drafter=NO_DRAFTER,
            max_lookahead=0,
        )

    def _write(self, length: int) -> list[int]:
        """A text that is `length` tokens long and a few more, the second half the verifier's own.

        Behind tokens at random it would be in states that no text leads to.
        """
        start = [7 * index % self._vocab_size for index in range(max(1, length // 2))]
        sequence = self._make(start, SamplingParams(temperature=1.0))
        try:
            while sequence.num_tokens < min(length + _NUM_DRAFTS, self._limit):
                assert self._scheduler.pool.grow(sequence, sequence.num_tokens)
                verdict = self._prefill(sequence)
                # A model without numbers writes anything.
                sequence.token_ids += verdict.token_ids[:1] if verdict else []
                if sequence.num_uncomputed == 0:
                    sequence.token_ids.append(1)
        finally:
            self._scheduler.pool.shrink(sequence, 0)
            for drafter in self._drafters.values():
                drafter.forget(sequence)
        return sequence.token_ids

    def _prefill(self, sequence: Sequence) -> Verdict | None:
        """Computes all known tokens; what comes behind the last."""
        num_tokens = sequence.num_tokens
        step = self._scheduler.max_num_batched_tokens
        while sequence.num_computed < num_tokens:
            part = min(step, sequence.num_uncomputed)
            scheduled = ScheduledSequence(sequence, part, 0)
            for drafter in self._drafters.values():
                drafter.prefill([scheduled])
            output, verdicts = self._run([scheduled])
            sequence.num_computed += part
        for name in self._drafters:
            sequence.drafter = name
            self._round.observe([scheduled], output, verdicts)
        sequence.drafter = NO_DRAFTER
        return verdicts[0]

    def _run(self, batch: list[ScheduledSequence]) -> tuple[VerifierOutput, list[Verdict | None]]:
        output = self._round.verify(batch)
        return output, self._round.accept(batch, output)

    def _time(
        self, runs: Mapping[T, Callable[[], object]], before: Callable[[], object] = int
    ) -> dict[T, float]:
        """The shortest of a few times of each run, each behind `before`.

        All runs take turns, so that a slow while of the machine can't bend a curve.
        """
        seconds: dict[T, list[float]] = {key: [] for key in runs}
        for _ in range(1 + _REPETITIONS):
            for key, run in runs.items():
                before()
                started = time.perf_counter()
                run()
                self.wing.synchronize()
                seconds[key].append(time.perf_counter() - started)
        # The first only warms up.
        shortest = {key: min(each[1:]) for key, each in seconds.items()}
        self._spreads += [median_high(seconds[key][1:]) / shortest[key] - 1 for key in runs]
        return shortest

    def _pass(self, sequences: list[Sequence], num_rows: int) -> Callable[[], object]:
        """A pass over so many rows, dealt evenly to the sequences."""
        batch = []
        for index, sequence in enumerate(sequences):
            num_drafts = (num_rows - index - 1) // len(sequences)
            drafts = list(islice(cycle(self._drafts), num_drafts))
            batch.append(ScheduledSequence(sequence, 1, num_drafts, Draft(drafts)))
        return lambda: self._run(batch)

    def _verify_costs(self, sequences: list[Sequence]) -> tuple[Curve, float]:
        """A pass by its rows, for one sequence, and what each further sequence adds.

        Rows are dealt as in service, a few to each sequence.
        """
        first = sequences[0]
        pool = self._scheduler.pool
        room = len(first.block_tables[0].blocks) * pool.block_size - first.num_computed
        limit = min(room * len(sequences), self._scheduler.max_num_batched_tokens)
        counts = {n: min(len(sequences), -(-n // _ROWS_EACH)) for n in _ROWS if n <= limit}
        layouts = [(count, num_rows) for num_rows, count in counts.items()]
        spread = max(n for n in counts if n <= min(_MAX_SPREAD, len(sequences)))
        runs = {
            (count, num_rows): self._pass(sequences[:count], num_rows)
            for count, num_rows in [*layouts, (spread, spread)]
        }
        seconds = self._time(runs)
        for _ in range(_MORE_LOOKS):
            found = {num_rows: seconds[count, num_rows] for count, num_rows in layouts}
            again = {key: runs[key] for key in layouts if key[1] in doubtful(found)}
            if not again:
                break
            seconds |= {key: min(seconds[key], s) for key, s in self._time(again).items()}
        more = spread - counts[spread]
        sequence = 0.0
        if more:
            sequence = (seconds[spread, spread] - seconds[counts[spread], spread]) / more
        sequence = max(0.0, sequence)
        verify = {n: seconds[count, n] - sequence * (count - 1) for n, count in counts.items()}
        return Curve(verify), sequence

    def _prompt_token_cost(self, sequence: Sequence) -> float:
        """From passes over a half and the whole of a prompt."""
        known = sequence.num_computed

        def run(count: int) -> None:
            sequence.num_computed = known - count
            self._run([ScheduledSequence(sequence, count, 0)])  # yields no token

        seconds = self._time({count: partial(run, count) for count in (known // 2, known)})
        sequence.num_computed = known
        return max(0.0, seconds[known] - seconds[known // 2]) / (known - known // 2)

    def _draft_costs(self, name: str, sequences: list[Sequence]) -> DraftCosts:
        counts = [c for c in _SEQUENCES if c <= len(sequences)]
        runs = {
            (count, guesses): self._drafting(name, sequences[:count], guesses)
            for count in counts
            for guesses in (1, _GUESSES)
        }
        # A pass leaves nothing of the drafter's weights in the processor's caches.
        step = [ScheduledSequence(sequences[0], 1, 0)]
        seconds = self._time(runs, lambda: self._round.verify(step))
        begin, guess = {}, {}
        for count in counts:
            few, many = seconds[count, 1], seconds[count, _GUESSES]
            guess[count] = max(0.0, many - few) / (_GUESSES - 1)
            begin[count] = max(0.0, few - guess[count])
        return DraftCosts(Curve(begin), Curve(guess))

    def _drafting(self, name: str, sequences: list[Sequence], guesses: int) -> Callable[[], object]:
        return lambda: self._round.guess(name, sequences, guesses)


def doubtful(seconds: Mapping[int, float]) -> list[int]:
    """The counts that seem to have been disturbed, which only ever adds to a time.

    More never costs less, and so many times as many never more than so many times as much.
    """
    return [
        count
        for count, found in seconds.items()
        if any(
            found > _DOUBTFUL * other * max(1.0, count / smaller)
            for smaller, other in seconds.items()
            if smaller != count
        )
    ]
