"""The scheduler under any order of arrivals, rejections, cancels and preemptions, without torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from block_tables import num_blocks_of
from tandem import FinishReason, SamplingParams, Sequence
from tandem.cache.block_pool import BlockPool
from tandem.cache.layer_groups import LayerGroup
from tandem.lookahead.prompt_budget import PromptLimits
from tandem.requests.sequence import ScheduledSequence
from tandem.scheduler import Scheduler

BLOCK_SIZE = 4
MAX_MODEL_LEN = 24
MAX_LAG = 3


def sequence(num_prompt: int, max_tokens: int = 8, limit: int = 0, number: int = 0) -> Sequence:
    return Sequence(
        id=number,
        token_ids=[9] * num_prompt,
        num_prompt_tokens=num_prompt,
        params=SamplingParams(max_tokens=max_tokens),
        seed=0,
        drafter="ngram",
        max_lookahead=limit,
    )


def commit(
    scheduler: Scheduler,
    scheduled: ScheduledSequence,
    drafts: int,
    accepted: int,
    num_cached: Callable[[Sequence], int] = lambda one: one.num_computed,
) -> None:
    """What the engine does after a pass, without a model.

    Args:
        num_cached: as a drafter's.
    """
    one = scheduled.sequence
    yields = scheduled.yields_token
    one.num_computed += scheduled.num_tokens
    if yields:
        for _ in range(min(drafts, accepted) + 1):
            one.token_ids.append(9)
            if (
                one.num_output_tokens >= one.params.max_tokens
                or one.num_tokens >= scheduler.max_model_len
            ):
                one.finish(FinishReason.LENGTH)
                break
        else:
            one.num_computed += min(drafts, accepted)
    num_tokens = num_cached(one)
    scheduler.pool.share(one, num_tokens)
    if one.is_finished:
        scheduler.remove(one)
    else:
        scheduler.pool.shrink(one, one.num_tokens)
        scheduler.pool.release(one, num_tokens)


class SchedulerMachine(RuleBasedStateMachine):
    """A whole engine but for the model: drafts are accepted as the test pleases.

    `contents` is what a cache would hold: for each slot of a group all tokens up to the one whose
    K/V were written last. What a pass reads in it has to be the sequence's own.
    """

    @initialize(
        num_blocks=st.integers(MAX_MODEL_LEN // BLOCK_SIZE, 14),
        windows=st.sampled_from([[None], [None, 5], [None, 8], [None, 3, 10], [8], [5, 9]]),
        fewer=st.integers(0, 6),
        max_num_seqs=st.integers(1, 5),
        spare_tokens=st.integers(0, 10),
        caching=st.booleans(),
    )
    def start(
        self,
        num_blocks: int,
        windows: list[int | None],
        fewer: int,
        max_num_seqs: int,
        spare_tokens: int,
        caching: bool,
    ) -> None:
        max_num_batched_tokens = max_num_seqs + spare_tokens
        groups = []
        for window in windows:
            # Enough for one sequence.
            least = num_blocks
            if window is not None:
                least = -(-(window + 2 + max_num_batched_tokens + MAX_LAG) // BLOCK_SIZE) + 2
            groups.append(LayerGroup(window, max(min(least, num_blocks), num_blocks - fewer)))
        self.scheduler = Scheduler(
            BlockPool(groups, BLOCK_SIZE, enable_prefix_caching=caching),
            max_num_seqs,
            max_num_batched_tokens,
            MAX_MODEL_LEN,
        )
        self.live: list[Sequence] = []
        self.ended: list[list[int]] = []
        self.contents: dict[tuple[int, int], list[int]] = {}
        self.lags: dict[int, int] = {}
        self.cached: dict[int, int] = {}
        self.num_added = 0

    @rule(
        prompt=st.lists(st.sampled_from([0, 9]), min_size=1, max_size=MAX_MODEL_LEN - 1),
        goes_on=st.none() | st.integers(0, 3),
        max_tokens=st.integers(1, 12),
        limit=st.integers(0, 6),
    )
    def arrive(self, prompt: list[int], goes_on: int | None, max_tokens: int, limit: int) -> None:
        """Often a sequence that goes on where another has ended."""
        if goes_on is not None and goes_on < len(self.ended):
            prompt = (self.ended[-1 - goes_on] + prompt)[: MAX_MODEL_LEN - 1]
        one = sequence(len(prompt), max_tokens, limit, self.num_added)
        one.token_ids = list(prompt)
        self.num_added += 1
        self.scheduler.add(one)
        self.live.append(one)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.live:
            one = data.draw(st.sampled_from(self.live))
            one.finish(FinishReason.CANCELLED)
            self.scheduler.remove(one)
            self.live.remove(one)

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        self.advance(lambda most: data.draw(st.integers(0, most)))

    def advance(self, choose) -> None:
        scheduler = self.scheduler
        decoding = [one for one in scheduler.running if one.is_decoding]
        had_work = scheduler.has_work
        limits = PromptLimits(most=1 + choose(12), enough=1 + choose(12))
        batch = scheduler.schedule(limits)
        prompts = [one.num_tokens for one in batch if one.sequence not in decoding]
        assert sum(prompts) <= limits.most
        assert sum(prompts[:-1]) < limits.enough
        self.check_batch(batch, decoding)
        assert bool(batch) == had_work
        for scheduled in batch:
            drafts = choose(scheduled.num_draft_tokens)
            accepted = choose(drafts)
            self.compute(scheduled, [9] * accepted + [5] * (drafts - accepted))
            self.lags[scheduled.sequence.id] = choose(MAX_LAG)
            commit(scheduler, scheduled, drafts, accepted, self.num_cached)
        self.ended += [one.token_ids for one in self.live if one.is_finished]
        self.live = [one for one in self.live if not one.is_finished]

    def compute(self, scheduled: ScheduledSequence, draft_ids: list[int]) -> None:
        """Reads and writes what a pass does, and a drafter that is behind as far as it may be."""
        one = scheduled.sequence
        start = one.num_computed
        known = one.token_ids[: start + scheduled.num_tokens] + draft_ids
        for number, group in enumerate(self.scheduler.pool.groups):
            for position in range(self.num_cached(one), len(known)):
                first = 0
                if group.window is not None:
                    # An assistant's query stands behind the computed tokens; its window includes
                    # both ends.
                    reach = group.window + 1 if position == start else group.window - 1
                    first = max(0, position - reach)
                for read in range(first, min(position, start)):
                    assert self.contents[number, self.slot(one, number, read)] == known[: read + 1]
                if position >= start:
                    slot = self.slot(one, number, position)
                    self.contents[number, slot] = known[: position + 1]

    def num_cached(self, one: Sequence) -> int:
        """Tokens that a drafter has, which is behind now and then and never loses any."""
        before = min(self.cached.get(one.id, 0), one.num_computed)
        now = max(before, one.num_cached_tokens, one.num_computed - self.lags.get(one.id, 0))
        self.cached[one.id] = now
        return now

    def slot(self, one: Sequence, group: int, position: int) -> int:
        table = one.block_tables[group]
        assert position // BLOCK_SIZE >= table.start
        return table.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE

    def check_batch(self, batch: list[ScheduledSequence], decoding: list[Sequence]) -> None:
        scheduler = self.scheduler
        scheduled = [one.sequence for one in batch]
        assert len(set(scheduled)) == len(scheduled)
        assert set(scheduled) <= set(scheduler.running)
        assert sum(b.num_tokens + b.num_draft_tokens for b in batch) <= (
            scheduler.max_num_batched_tokens
        )
        for one in decoding:
            assert one in scheduled or one in scheduler.waiting
        for one in batch:
            assert one.num_tokens >= 1
            last = one.sequence.num_computed + one.num_tokens + one.num_draft_tokens
            for table in one.sequence.block_tables:
                assert last <= len(table.blocks) * BLOCK_SIZE
            assert one.num_draft_tokens == 0 or one.yields_token
            remaining = one.sequence.params.max_tokens - one.sequence.num_output_tokens
            assert one.num_draft_tokens <= max(0, remaining - 1)
        # The oldest runs on, whatever happens to those behind it.
        if scheduler.running and scheduler.running[0].is_decoding:
            assert scheduler.running[0] in scheduled

    @invariant()
    def the_pool_is_intact(self) -> None:
        self.scheduler.check_integrity()
        assert len(self.scheduler.running) <= self.scheduler.max_num_seqs
        queued = [*self.scheduler.running, *self.scheduler.waiting]
        assert sorted(one.id for one in queued) == sorted(one.id for one in self.live)
        assert all(num_blocks_of(one) == 0 for one in self.scheduler.waiting)

    def teardown(self) -> None:
        """Everything ends, and nothing is left in the pool."""
        if not hasattr(self, "scheduler"):
            return
        # Each output token may cost its sequence's whole prefill anew, one token a step.
        limit = sum(one.params.max_tokens for one in self.live) * MAX_MODEL_LEN + 1
        for _ in range(limit):
            if not self.scheduler.has_work:
                break
            self.advance(lambda most: 0)
        assert not self.scheduler.has_work
        assert self.scheduler.pool.num_used == 0
        self.scheduler.check_integrity()


TestScheduler = SchedulerMachine.TestCase


def test_drafts_go_before_a_sequence_is_preempted() -> None:
    """A sequence that can't have blocks for its drafts decodes without them."""
    scheduler = Scheduler(BlockPool([LayerGroup(None, 2)], BLOCK_SIZE), 2, 32, MAX_MODEL_LEN)
    first, second = sequence(3, 8, 4), sequence(3, 8, 4, 1)
    scheduler.add(first)
    scheduler.add(second)
    for scheduled in scheduler.schedule():
        commit(scheduler, scheduled, 0, 0)
    batch = scheduler.schedule()
    assert [one.sequence for one in batch] == [first, second]
    assert [one.num_draft_tokens for one in batch] == [0, 0]
    assert scheduler.num_preemptions == 0


def test_the_youngest_is_preempted_and_resumes_first() -> None:
    """It goes to the head of the queue, before those that never ran."""
    scheduler = Scheduler(BlockPool([LayerGroup(None, 2)], BLOCK_SIZE), 2, 32, 8)
    first, second, third = (sequence(4, 8, 0, number) for number in range(3))
    for one in (first, second, third):
        scheduler.add(one)
    for scheduled in scheduler.schedule():
        commit(scheduler, scheduled, 0, 0)
    batch = scheduler.schedule()
    assert [one.sequence for one in batch] == [first]
    assert scheduler.num_preemptions == 1
    assert list(scheduler.waiting) == [second, third]
    assert second.num_computed == 0
    assert second.num_output_tokens == 1


def test_a_preempted_sequence_finds_its_blocks_again() -> None:
    """Its prompt's two blocks were free in the meantime, and nobody needed them."""
    scheduler = Scheduler(BlockPool([LayerGroup(None, 5)], BLOCK_SIZE), 2, 32, 24)
    older, younger = sequence(8, 5, 0), sequence(8, 8, 0, 1)
    younger.token_ids = list(range(8))
    for one in (older, younger):
        scheduler.add(one)
    while not scheduler.num_preemptions:
        for scheduled in scheduler.schedule():
            commit(scheduler, scheduled, 0, 0)
    while not older.is_finished:
        assert list(scheduler.waiting) == [younger]
        for scheduled in scheduler.schedule():
            commit(scheduler, scheduled, 0, 0)
    (scheduled,) = scheduler.schedule()
    assert scheduled.sequence is younger
    assert younger.num_cached_tokens == younger.num_computed == 8
    assert scheduled.num_tokens == younger.num_tokens - 8


def test_prompts_that_begin_alike_wait_for_the_first() -> None:
    """Four of 20 tokens, 16 a step: what one computes, those behind it find."""
    scheduler = Scheduler(BlockPool([LayerGroup(None, 64)], BLOCK_SIZE), 4, 16, 64)
    prompts = [sequence(20, number=number) for number in range(4)]
    for one in prompts:
        scheduler.add(one)
    num_computed = 0
    while any(one.num_output_tokens == 0 for one in prompts):
        batch = scheduler.schedule()
        num_computed += sum(s.num_tokens for s in batch if not s.sequence.num_output_tokens)
        for scheduled in batch:
            commit(scheduler, scheduled, 0, 0)
    assert [one.num_cached_tokens for one in prompts] == [0, 16, 16, 16]
    assert num_computed == 20 + 3 * 4


def test_blocks_that_a_sequence_found_are_counted_once_it_begins() -> None:
    """However often it was asked before whether there is room: it lacks a block for three steps."""
    scheduler = Scheduler(BlockPool([LayerGroup(None, 5)], BLOCK_SIZE), 2, 32, 24)
    first, second = sequence(12, 3), sequence(20, 3, number=1)
    for one in (first, second):
        scheduler.add(one)
    (blocks,) = scheduler.pool.blocks
    while not first.is_finished:
        (scheduled,) = scheduler.schedule()
        assert blocks.num_reused == 0
        commit(scheduler, scheduled, 0, 0)
    scheduler.schedule()
    assert blocks.num_reused == second.num_cached_tokens // BLOCK_SIZE == 3


def test_decoding_goes_before_a_long_prompt() -> None:
    """The prompt gets what decoding leaves, chunk by chunk."""
    scheduler = Scheduler(BlockPool([LayerGroup(None, 20)], BLOCK_SIZE), 4, 8, 64)
    decoding, prompt = sequence(2, 30, 3), sequence(20, 8, 0, 1)
    scheduler.add(decoding)
    for scheduled in scheduler.schedule():
        commit(scheduler, scheduled, 0, 0)
    scheduler.add(prompt)
    chunks = []
    while not prompt.num_output_tokens:
        batch = {one.sequence: one for one in scheduler.schedule()}
        assert batch[decoding].num_draft_tokens == 3
        chunks.append(batch[prompt].num_tokens)
        for scheduled in batch.values():
            commit(scheduler, scheduled, 0, 0)
    assert chunks == [4, 4, 4, 4, 4]


def test_a_prompt_gets_less_while_others_decode() -> None:
    """As few tokens as the caller says; else it gets the whole budget."""
    scheduler = Scheduler(BlockPool([LayerGroup(None, 20)], BLOCK_SIZE), 4, 8, 64)
    first, second = sequence(6, 2), sequence(20, 8, 0, 1)
    scheduler.add(first)
    chunks = []
    for limits in (PromptLimits(), PromptLimits(most=3), PromptLimits()):
        batch = scheduler.schedule(limits)
        chunks.append([one.num_tokens for one in batch])
        for scheduled in batch:
            commit(scheduler, scheduled, 0, 0)
        if not chunks[1:]:
            scheduler.add(second)
    # `first` is computed, decodes its second and last token, and leaves `second` alone.
    assert chunks == [[6], [1, 3], [8]]


@pytest.mark.parametrize(
    ("enough", "expected"), [(None, [[3, 3, 2], [1, 1, 1, 3]]), (4, [[3, 3], [1, 1, 3, 3]])]
)
def test_no_further_prompt_joins_where_there_are_enough_tokens(
    enough: int | None, expected: list[list[int]]
) -> None:
    """The one that reaches the number isn't cut, and the next is the first in the next step."""
    scheduler = Scheduler(BlockPool([LayerGroup(None, 20)], BLOCK_SIZE), 4, 8, 64)
    for number in range(4):
        scheduler.add(sequence(3, number=number))
    chunks = []
    for _ in expected:
        batch = scheduler.schedule(PromptLimits(enough=enough))
        chunks.append([one.num_tokens for one in batch])
        for scheduled in batch:
            commit(scheduler, scheduled, 0, 0)
    assert chunks == expected
    assert scheduler.waiting == deque()


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (PromptLimits(most=3, later=9), 0),
        (PromptLimits(most=4, later=9), 4),
        (PromptLimits(most=3, later=3), 3),
        (PromptLimits(), 7),
    ],
)
def test_a_chunk_of_a_very_long_prompt_is_not_short(limits: PromptLimits, expected: int) -> None:
    """It would read all that is computed for a few tokens; unless a later step had no more room."""
    scheduler = Scheduler(BlockPool([LayerGroup(None, 3000)], BLOCK_SIZE), 2, 8, 8192)
    decoding, long = sequence(1, 30), sequence(4096, number=1)
    scheduler.add(decoding)
    commit(scheduler, *scheduler.schedule(), 0, 0)
    scheduler.add(long)
    while long.num_computed < 4 * 512:
        for scheduled in scheduler.schedule():
            commit(scheduler, scheduled, 0, 0)
        decoding.token_ids = decoding.token_ids[:2]
        decoding.num_computed = 1
    batch = scheduler.schedule(limits)
    assert batch[0].sequence is decoding
    assert sum(one.num_tokens for one in batch[1:]) == expected
    for scheduled in batch:
        commit(scheduler, scheduled, 0, 0)
    scheduler.check_integrity()


@pytest.mark.parametrize("limits", [PromptLimits(most=3, later=9), PromptLimits(most=3, later=3)])
def test_the_end_of_a_very_long_prompt_may_be_short(limits: PromptLimits) -> None:
    scheduler = Scheduler(BlockPool([LayerGroup(None, 3000)], BLOCK_SIZE), 2, 4096, 8192)
    one = sequence(4099)
    scheduler.add(one)
    commit(scheduler, *scheduler.schedule(), 0, 0)
    [last] = scheduler.schedule(limits)
    assert last.num_tokens == 3


def test_decoding_sequences_each_keep_a_token_of_the_budget() -> None:
    """Drafts of the first never push the last one out of the step."""
    scheduler = Scheduler(BlockPool([LayerGroup(None, 40)], BLOCK_SIZE), 4, 6, 64)
    sequences = [sequence(1, 30, 6, number) for number in range(4)]
    for one in sequences:
        scheduler.add(one)
    for scheduled in scheduler.schedule():
        commit(scheduler, scheduled, 0, 0)
    batch = scheduler.schedule()
    assert [one.sequence for one in batch] == sequences
    assert [one.num_draft_tokens for one in batch] == [2, 0, 0, 0]


@pytest.mark.parametrize("where", ["waiting", "running"])
def test_removing_frees_the_blocks(where: str) -> None:
    scheduler = Scheduler(BlockPool([LayerGroup(None, 4)], BLOCK_SIZE), 1, 8, 16)
    first, second = sequence(4), sequence(4, number=1)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.schedule()
    scheduler.remove(first if where == "running" else second)
    scheduler.check_integrity()
    assert scheduler.pool.num_used == (0 if where == "running" else 1)


def test_drafts_leave_a_prompt_its_share_of_the_budget() -> None:
    """However much is drafted: half of what the decoding tokens leave, so 3 tokens a step."""
    scheduler = Scheduler(BlockPool([LayerGroup(None, 64)], BLOCK_SIZE), 4, 8, 200)
    decoding = [sequence(1, max_tokens=150, limit=8, number=number) for number in range(2)]
    for one in decoding:
        scheduler.add(one)
    for scheduled in scheduler.schedule():
        commit(scheduler, scheduled, 0, 0)
    prompt = sequence(20, number=2)
    scheduler.add(prompt)
    for _ in range(7):
        batch = scheduler.schedule()
        assert {one.sequence for one in batch} == {*decoding, prompt}
        for scheduled in batch:
            commit(scheduler, scheduled, scheduled.num_draft_tokens, 0)
    assert prompt.num_output_tokens == 1


def test_drafts_of_the_older_go_before_the_younger_is_preempted() -> None:
    """One block is left, and the younger's known token needs it."""
    scheduler = Scheduler(BlockPool([LayerGroup(None, 5)], BLOCK_SIZE), 2, 32, 200)
    older, younger = sequence(6, 50, 4, 0), sequence(7, 50, 4, 1)
    for one in (older, younger):
        scheduler.add(one)
    for scheduled in scheduler.schedule():
        commit(scheduler, scheduled, 0, 0)
    younger.token_ids.append(9)
    younger.num_computed += 1
    batch = scheduler.schedule()
    assert [one.sequence for one in batch] == [older, younger]
    assert scheduler.num_preemptions == 0
