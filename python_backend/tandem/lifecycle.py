"""How sequences come, what they leave behind for others, and how they end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from threading import Lock

from tandem.drafters.drafter import Drafter
from tandem.errors import TandemError, VerifierOutputError
from tandem.lookahead.prompt_budget import PromptLimits
from tandem.metrics import EngineStats
from tandem.requests.outputs import Delta
from tandem.requests.sequence import FinishReason, ScheduledSequence, Sequence
from tandem.scheduler import Scheduler


class Lifecycle:
    """Guards the scheduler and its pool, which requests may enter from any thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        drafters: Mapping[str, Drafter],
        stats: EngineStats,
        forget: Callable[[Sequence], None],
    ) -> None:
        """Takes the engine's parts.

        Args:
            forget: called with a sequence that has ended, so that nothing is kept about it.
        """
        self._scheduler = scheduler
        self._drafters = drafters
        self._stats = stats
        self._forget = forget
        self._lock = Lock()

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence; the next step may run it."""
        with self._lock:
            self._scheduler.add(sequence)
            self._stats.num_prompt_tokens += sequence.num_prompt_tokens

    def schedule(self, limits: Callable[[int, int], PromptLimits]) -> list[ScheduledSequence]:
        """Chooses who runs in the next step.

        Args:
            limits: of prompts, by how many sequences decode and how many have prompts to compute.
        """
        with self._lock:
            batch = self._scheduler.schedule(limits(*self._scheduler.demand))
        now = time.monotonic()
        for scheduled in batch:
            sequence = scheduled.sequence
            if sequence.started_at is None:
                sequence.started_at = now
                if self._scheduler.pool.enable_prefix_caching:
                    self._stats.note_prefix_cache(sequence.num_tokens, sequence.num_cached_tokens)
        return batch

    def settle(self, batch: Items[ScheduledSequence]) -> None:
        """Lets others use what a step has committed, and frees what has ended or was rejected."""
        with self._lock:
            for scheduled in batch:
                sequence = scheduled.sequence
                num_tokens = self._num_cached(sequence)
                self._share(sequence, num_tokens)
                if sequence.is_finished:
                    self._release(sequence)
                else:
                    self._scheduler.pool.shrink(sequence, sequence.num_tokens)
                    self._scheduler.pool.release(sequence, num_tokens)

    def end_cancelled(self) -> list[Delta]:
        """Ends the sequences whose cancellation was asked for."""
        with self._lock:
            return [
                self._end(s, FinishReason.CANCELLED, s.cancellation)
                for s in self._scheduler.live
                if s.cancellation
            ]

    def end(self, sequences: Items[Sequence], error: TandemError) -> None:
        """Ends those of some sequences that have not ended; no step may be running."""
        with self._lock:
            for sequence in sequences:
                if not sequence.is_finished:
                    self._end(sequence, FinishReason.CANCELLED, error)

    def abort(self, error: TandemError, *, waiting: bool) -> list[Delta]:
        """Ends all that run, and all that wait if `waiting`; no step may be running."""
        with self._lock:
            live = self._scheduler.live if waiting else list(self._scheduler.running)
            return [self._end(sequence, FinishReason.ERROR, error) for sequence in live]

    def check_integrity(self) -> None:
        """Recounts the block pool."""
        with self._lock:
            self._scheduler.check_integrity()

    def _end(self, sequence: Sequence, reason: FinishReason, error: TandemError) -> Delta:
        if sequence.is_finished:  # in a step that failed behind it
            sequence.finish_reason = None
        sequence.finish(reason, error)
        self._release(sequence)
        return Delta(sequence, [], finish_reason=reason)

    def _num_cached(self, sequence: Sequence) -> int:
        """Committed tokens that neither the verifier nor the drafter will compute again."""
        # A sequence that is never drafted for needs nothing of its drafter.
        drafter = self._drafters.get(sequence.drafter) if sequence.max_lookahead else None
        return sequence.num_computed if drafter is None else drafter.num_cached(sequence)

    def _share(self, sequence: Sequence, num_tokens: int) -> None:
        """Lets later requests use what is committed, but not what gave no numbers."""
        if isinstance(sequence.error, VerifierOutputError):
            self._scheduler.pool.withdraw(sequence)
        else:
            self._scheduler.pool.share(sequence, num_tokens)

    def _release(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        self._forget(sequence)
