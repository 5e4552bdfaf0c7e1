"""Who runs in this step and with how many tokens; integers only."""

from __future__ import annotations

from collections import deque

from tandem.block_pool import BlockPool
from tandem.lookahead import lookahead
from tandem.sequence import ScheduledSequence, Sequence


class Scheduler:
    """Admits waiting sequences, cuts prompts into chunks and preempts when blocks run out.

    One token budget bounds a step. Decoding sequences come first, so a long prompt delays them by
    a chunk at most; sequences are otherwise served in order of admission. When blocks run out,
    drafts go first, then the sequence admitted last: it is freed and computed again later.
    """

    def __init__(
        self, pool: BlockPool, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int
    ) -> None:
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Puts a new sequence at the end of the queue."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.pool.shrink(sequence, 0)

    def schedule(self) -> list[ScheduledSequence]:
        """Chooses the sequences of the next step and gives them the blocks that they need."""
        batch: dict[Sequence, ScheduledSequence] = {}
        budget = self.max_num_batched_tokens
        # Sorting is stable: within each kind the order of admission stays.
        todo = deque(sorted(self.running, key=lambda sequence: not sequence.is_decoding))
        while todo and budget > 0:
            sequence = todo.popleft()
            if sequence not in self.running:  # preempted a moment ago
                continue
            num_tokens = min(sequence.num_uncomputed, budget)
            num_drafts = 0
            if sequence.is_decoding:
                # Every decoding sequence behind this one keeps one token of the budget.
                spare = budget - num_tokens - sum(s.is_decoding for s in todo)
                num_drafts = max(0, min(lookahead(sequence, self.max_model_len), spare))
            scheduled = self._make_room(sequence, num_tokens, num_drafts, batch)
            if scheduled is not None:
                batch[sequence] = scheduled
            budget = self.max_num_batched_tokens - sum(
                s.num_tokens + s.num_draft_tokens for s in batch.values()
            )
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            if not self.pool.grow(sequence, sequence.num_tokens):
                break
            self.running.append(self.waiting.popleft())
            num_tokens = min(sequence.num_uncomputed, budget)
            batch[sequence] = ScheduledSequence(sequence, num_tokens, 0)
            budget -= num_tokens
        return list(batch.values())

    def _make_room(
        self,
        sequence: Sequence,
        num_tokens: int,
        num_drafts: int,
        batch: dict[Sequence, ScheduledSequence],
    ) -> ScheduledSequence | None:
        needed = sequence.num_computed + num_tokens
        if self.pool.grow(sequence, needed + num_drafts):
            return ScheduledSequence(sequence, num_tokens, num_drafts)
        while not self.pool.grow(sequence, needed):
            victim = self.running[-1]
            self._preempt(victim)
            batch.pop(victim, None)
            if victim is sequence:
                return None
        return ScheduledSequence(sequence, num_tokens, 0)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.shrink(sequence, 0)
        sequence.num_computed = 0
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def check_integrity(self) -> None:
        """Recounts the pool; see `BlockPool.check_integrity`."""
        self.pool.check_integrity([*self.running, *self.waiting])
