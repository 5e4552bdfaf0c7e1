"""Who runs in this step and with how many tokens; integers only."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Items

from tandem.cache.block_pool import BlockPool
from tandem.lookahead.lookahead import draft_limit
from tandem.lookahead.prompt_budget import NO_LIMITS, PromptLimits
from tandem.metrics import EngineLoad, GroupLoad
from tandem.requests.sequence import ScheduledSequence, Sequence

# A chunk reads all that is computed of its prompt, and is no smaller part of it if a later step has
# room for more.
_LEAST_PART = 512


class Scheduler:
    """Admits waiting sequences, cuts prompts into chunks and preempts when blocks run out.

    One token budget bounds a step. Decoding sequences come first, so a long prompt delays them by
    a chunk at most, and drafts leave prompts half of what is left. When blocks run out, drafts go
    first, then the sequence admitted last: it is freed and computed again later.
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

    @property
    def live(self) -> list[Sequence]:
        """Those that run, and those that wait."""
        return [*self.running, *self.waiting]

    @property
    def demand(self) -> tuple[int, int]:
        """How many sequences decode, and how many have prompts to compute."""
        num_decoding = sum(s.is_decoding for s in self.running)
        return num_decoding, len(self.running) + len(self.waiting) - num_decoding

    @property
    def load(self) -> EngineLoad:
        """What is held right now."""
        return EngineLoad(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            groups={
                group.name: GroupLoad(
                    blocks.num_blocks, blocks.num_used, blocks.num_reused, blocks.num_evicted
                )
                for group, blocks in zip(self.pool.groups, self.pool.blocks, strict=True)
            },
            num_preemptions=self.num_preemptions,
        )

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

    def schedule(self, prompt_limits: PromptLimits = NO_LIMITS) -> list[ScheduledSequence]:
        """Chooses the sequences of the next step and gives them the blocks that they need."""
        batch = self._schedule_decoding()
        self._add_drafts(batch)
        budget = self.max_num_batched_tokens - sum(s.num_tokens + s.num_draft_tokens for s in batch)
        later = min(budget, prompt_limits.later)
        if prompt_limits.most is not None:
            budget = min(budget, prompt_limits.most)
        enough = budget if prompt_limits.enough is None else min(budget, prompt_limits.enough)
        prompts = deque(s for s in self.running if not s.is_decoding)
        num_chosen = 0
        while num_chosen < enough:
            left = budget - num_chosen
            sequence = prompts.popleft() if prompts else self._admit(left)
            if sequence is None:
                break
            num_tokens = min(sequence.num_uncomputed, left)
            least = min(sequence.num_uncomputed, sequence.num_computed // _LEAST_PART, later)
            if num_tokens < least:
                break
            if self._has_room(sequence, num_tokens, batch):
                batch.append(ScheduledSequence(sequence, num_tokens, 0))
                num_chosen += num_tokens
        return batch

    def _has_room(
        self, sequence: Sequence, num_tokens: int, batch: Items[ScheduledSequence]
    ) -> bool:
        """Gets the blocks for the next tokens of a prompt, for which it may have to wait."""
        while sequence in self.running:
            if self.pool.grow(sequence, sequence.num_computed + num_tokens):
                return True
            if batch:
                return False
            # Nobody else would ever give any back.
            self._preempt(self.running[-1])
        return False

    def _schedule_decoding(self) -> list[ScheduledSequence]:
        batch = []
        for sequence in [s for s in self.running if s.is_decoding]:
            while sequence in self.running and not self.pool.grow(sequence, sequence.num_tokens):
                # The youngest is this one or one behind it, so none that is in the batch.
                self._preempt(self.running[-1])
            if sequence in self.running:
                batch.append(ScheduledSequence(sequence, 1, 0))
        return batch

    def _add_drafts(self, batch: list[ScheduledSequence]) -> None:
        """Drafts take what known tokens leave, of the budget and of the blocks."""
        budget = self.max_num_batched_tokens - len(batch)
        if self.waiting or len(batch) < len(self.running):
            budget //= 2  # the rest is for prompts
        for scheduled in batch:
            sequence = scheduled.sequence
            num_drafts = min(draft_limit(sequence, self.max_model_len), budget)
            if self.pool.grow(sequence, sequence.num_tokens + num_drafts):
                scheduled.num_draft_tokens = num_drafts
                budget -= num_drafts

    def _admit(self, num_tokens: int) -> Sequence | None:
        """Admits the next one, if there is room for its first `num_tokens` and all that it keeps.

        Not before there are tokens to give it: until then others may compute what it begins with.
        """
        if not self.waiting or len(self.running) >= self.max_num_seqs:
            return None
        sequence = self.waiting[0]
        num_cached_tokens = self.pool.reuse(sequence)
        first = min(sequence.num_tokens, num_cached_tokens + num_tokens)
        if not (
            self.pool.reserve(sequence, sequence.num_tokens) and self.pool.grow(sequence, first)
        ):
            self.pool.shrink(sequence, 0)
            return None
        self.pool.count_reuse(sequence)
        sequence.num_computed = sequence.num_cached_tokens = num_cached_tokens
        self.running.append(self.waiting.popleft())
        return sequence

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.shrink(sequence, 0)
        sequence.num_computed = 0
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def check_integrity(self) -> None:
        """Recounts the pool; see `BlockPool.check_integrity`."""
        self.pool.check_integrity(self.live)
