"""The block pool under any order of growing and shrinking."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from block_tables import blocks_of
from tandem import SamplingParams, Sequence
from tandem.cache.block_pool import BlockPool
from tandem.cache.layer_groups import LayerGroup

NUM_BLOCKS, BLOCK_SIZE = 12, 4


def sequence(number: int = 0) -> Sequence:
    return Sequence(
        id=number,
        token_ids=[9],
        num_prompt_tokens=1,
        params=SamplingParams(),
        seed=0,
        drafter="none",
        max_lookahead=0,
    )


def is_contiguous(table: list[int]) -> bool:
    return table == list(range(table[0], table[0] + len(table)))


class PoolMachine(RuleBasedStateMachine):
    """Four sequences grow and shrink at will."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool([LayerGroup(None, NUM_BLOCKS)], BLOCK_SIZE)
        self.sequences = [sequence(number) for number in range(4)]

    @rule(which=st.integers(0, 3), num_tokens=st.integers(0, NUM_BLOCKS * BLOCK_SIZE + 5))
    def grow(self, which: int, num_tokens: int) -> None:
        table = blocks_of(self.sequences[which])
        free = self.pool.blocks[0].num_free
        grown = self.pool.grow(self.sequences[which], num_tokens)
        after = blocks_of(self.sequences[which])
        assert after[: len(table)] == table
        missing = max(0, -(-num_tokens // BLOCK_SIZE) - len(table))
        assert grown == (missing <= free)
        assert len(after) == len(table) + (missing if grown else 0)
        if all(not blocks_of(other) for i, other in enumerate(self.sequences) if i != which):
            assert not after or not grown or is_contiguous(after) or not is_contiguous(table)

    @rule(which=st.integers(0, 3), num_tokens=st.integers(0, NUM_BLOCKS * BLOCK_SIZE))
    def shrink(self, which: int, num_tokens: int) -> None:
        table = blocks_of(self.sequences[which])
        self.pool.shrink(self.sequences[which], num_tokens)
        assert blocks_of(self.sequences[which]) == table[: -(-num_tokens // BLOCK_SIZE)]

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        self.pool.check_integrity(self.sequences)
        held = sum(len(blocks_of(one)) for one in self.sequences)
        assert self.pool.num_used == held
        assert all(0 <= block < NUM_BLOCKS for one in self.sequences for block in blocks_of(one))

    def teardown(self) -> None:
        for one in self.sequences:
            self.pool.shrink(one, 0)
        assert self.pool.num_used == 0


TestBlockPool = PoolMachine.TestCase


def test_sequences_that_grow_together_stay_contiguous() -> None:
    """Four that take one block at a time, in turns, in a pool with room for all."""
    pool = BlockPool([LayerGroup(None, 64)], BLOCK_SIZE)
    sequences = [sequence(number) for number in range(4)]
    for num_tokens in range(BLOCK_SIZE, 15 * BLOCK_SIZE + 1, BLOCK_SIZE):
        for one in sequences:
            assert pool.grow(one, num_tokens)
    assert all(is_contiguous(blocks_of(one)) for one in sequences)


def test_freed_blocks_are_used_again() -> None:
    pool = BlockPool([LayerGroup(None, 4)], BLOCK_SIZE)
    one, other = sequence(1), sequence(2)
    assert pool.grow(one, 4 * BLOCK_SIZE)
    assert not pool.grow(other, 1)
    assert blocks_of(other) == []
    pool.shrink(one, BLOCK_SIZE + 1)
    assert pool.grow(other, 2 * BLOCK_SIZE)
    assert pool.blocks[0].num_free == 0


@pytest.mark.parametrize("damage", ["leak", "shared", "count"])
def test_check_integrity_notices(damage: str) -> None:
    pool = BlockPool([LayerGroup(None, 8)], BLOCK_SIZE)
    one, other = sequence(1), sequence(2)
    pool.grow(one, 8)
    pool.grow(other, 8)
    pool.check_integrity([one, other])
    if damage == "leak":
        one.block_tables[0].blocks.pop()
    elif damage == "shared":
        one.block_tables[0].blocks[0] = blocks_of(other)[0]
    else:
        pool.blocks[0]._num_open += 1
    with pytest.raises(AssertionError):
        pool.check_integrity([one, other])


class PrefixMachine(RuleBasedStateMachine):
    """Sequences of two tokens in two namespaces, so that many begin alike, come, grow and go.

    `contents` is what a cache would hold: each block's whole prefix, as its last writer knew it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool([LayerGroup(None, NUM_BLOCKS)], BLOCK_SIZE)
        self.live: list[Sequence] = []
        self.contents: dict[int, tuple[bytes, list[int]]] = {}
        self.num_made = 0

    def compute(self, one: Sequence, num_tokens: int) -> None:
        """Writes the K/V of the next tokens; nobody else may have those blocks."""
        one.num_computed += num_tokens
        for index in range(one.num_shared_blocks, self.pool.blocks_for(one.num_computed)):
            block = blocks_of(one)[index]
            assert not any(block in blocks_of(other) for other in self.live if other is not one)
            prefix = one.token_ids[: min((index + 1) * BLOCK_SIZE, one.num_computed)]
            self.contents[block] = (one.prefix_keys[0], prefix)

    @rule(
        token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=NUM_BLOCKS * BLOCK_SIZE),
        namespace=st.sampled_from([b"one", b"two"]),
        which=st.none() | st.integers(0, 3),
    )
    def arrive(self, token_ids: list[int], namespace: bytes, which: int | None) -> None:
        """Often a sequence that goes on where another is."""
        if which is not None and which < len(self.live):
            token_ids = self.live[which].token_ids + token_ids[:9]
        one = sequence(self.num_made)
        self.num_made += 1
        one.token_ids, one.num_prompt_tokens = list(token_ids), len(token_ids)
        one.prefix_keys = [namespace]
        free = self.pool.blocks[0].num_free
        num_tokens = self.pool.reuse(one)
        assert num_tokens == len(blocks_of(one)) * BLOCK_SIZE < one.num_tokens
        for index, block in enumerate(blocks_of(one)):
            prefix = one.token_ids[: (index + 1) * BLOCK_SIZE]
            assert self.contents[block] == (namespace, prefix)
        if self.pool.grow(one, one.num_tokens):
            one.num_computed = num_tokens
            self.live.append(one)
        else:
            self.pool.shrink(one, 0)
            assert self.pool.blocks[0].num_free == free

    @rule(which=st.integers(0, 3), share=st.floats(0, 1), hold=st.integers(0, BLOCK_SIZE))
    def step(self, which: int, share: float, hold: int) -> None:
        """Computes a part of what is left, and offers what is committed, or a little less."""
        if which < len(self.live):
            one = self.live[which]
            self.compute(one, round(share * one.num_uncomputed))
            self.pool.share(one, max(0, one.num_computed - hold))

    @rule(which=st.integers(0, 3), token_ids=st.lists(st.integers(0, 1), max_size=6))
    def extend(self, which: int, token_ids: list[int]) -> None:
        if which < len(self.live):
            one = self.live[which]
            if self.pool.grow(one, one.num_tokens + len(token_ids)):
                one.token_ids += token_ids

    @rule(which=st.integers(0, 3), offers=st.booleans())
    def end(self, which: int, offers: bool) -> None:
        if which < len(self.live):
            one = self.live.pop(which)
            if not offers:
                self.pool.withdraw(one)
            self.pool.shrink(one, 0)

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        self.pool.check_integrity(self.live)
        assert self.pool.num_used == len({b for one in self.live for b in blocks_of(one)})

    def teardown(self) -> None:
        for one in self.live:
            self.pool.shrink(one, 0)
        self.pool.check_integrity([])
        assert self.pool.num_used == 0


TestPrefixes = PrefixMachine.TestCase


def computed(pool: BlockPool, token_ids: list[int], *, namespace: bytes = b"") -> Sequence:
    """A sequence that has come, found what was cached, and computed and offered the rest."""
    one = sequence()
    one.token_ids, one.prefix_keys = list(token_ids), [namespace]
    one.num_cached_tokens = pool.reuse(one)
    assert pool.grow(one, one.num_tokens)
    one.num_computed = one.num_tokens
    pool.share(one, one.num_computed)
    return one


def num_cached(pool: BlockPool, token_ids: list[int], *, namespace: bytes = b"") -> int:
    """How many of the tokens a sequence would find."""
    one = sequence()
    one.token_ids, one.prefix_keys = list(token_ids), [namespace]
    found = pool.reuse(one)
    pool.shrink(one, 0)
    return found


@pytest.mark.parametrize(
    ("num_tokens", "found"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (10, 8), (30, 8)]
)
def test_full_blocks_are_found_but_never_the_last_token(num_tokens: int, found: int) -> None:
    """Eleven tokens were computed: two blocks are full."""
    pool = BlockPool([LayerGroup(None, 16)], BLOCK_SIZE)
    pool.shrink(computed(pool, list(range(11))), 0)
    assert pool.num_used == 0
    assert num_cached(pool, list(range(num_tokens))) == found


def test_a_prefix_is_all_that_came_before() -> None:
    pool = BlockPool([LayerGroup(None, 16)], BLOCK_SIZE)
    pool.shrink(computed(pool, [1, 2, 3, 4, 5, 6, 7, 8]), 0)
    assert num_cached(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == 8
    assert num_cached(pool, [1, 2, 3, 4, 5, 6, 7, 9, 9]) == 4
    assert num_cached(pool, [0, 2, 3, 4, 5, 6, 7, 8, 9]) == 0
    assert num_cached(pool, [5, 6, 7, 8, 9]) == 0
    assert num_cached(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9], namespace=b"another") == 0


def test_a_block_in_use_is_shared_and_counted_once() -> None:
    pool = BlockPool([LayerGroup(None, 16)], BLOCK_SIZE)
    one = computed(pool, list(range(10)))
    other = computed(pool, list(range(9)))
    assert blocks_of(other)[:2] == blocks_of(one)[:2]
    assert pool.num_used == 4
    pool.shrink(one, 0)
    pool.check_integrity([other])
    assert pool.num_used == 3
    assert num_cached(pool, list(range(20))) == 8


def test_what_was_computed_twice_at_once_is_kept_once() -> None:
    pool = BlockPool([LayerGroup(None, 16)], BLOCK_SIZE)
    first, second = sequence(1), sequence(2)
    for one in (first, second):
        one.token_ids = list(range(9))
        assert pool.reuse(one) == 0
        assert pool.grow(one, 9)
        one.num_computed = 9
    for one in (first, second):
        pool.share(one, 9)
        pool.check_integrity([first, second])
    assert not set(blocks_of(first)) & set(blocks_of(second))
    for one in (first, second):
        pool.shrink(one, 0)
    assert num_cached(pool, list(range(9))) == 8


def test_the_least_recently_used_goes_first_and_of_one_the_end() -> None:
    """Half of 16 blocks are protected: of three prefixes of four blocks, the two used last."""
    pool = BlockPool([LayerGroup(None, 16)], BLOCK_SIZE)
    prompts = {name: [ord(name)] * 16 for name in "abc"}
    for prompt in prompts.values():
        pool.shrink(computed(pool, prompt), 0)
    assert num_cached(pool, [*prompts["a"], 0]) == 16  # used once more: now b is the oldest
    pool.shrink(computed(pool, list(range(1000, 1000 + 8 * BLOCK_SIZE - 1))), 0)
    assert num_cached(pool, [*prompts["a"], 0]) == 16
    assert num_cached(pool, [*prompts["c"], 0]) == 16
    assert num_cached(pool, [*prompts["b"], 0]) == 0
    pool.shrink(computed(pool, list(range(2000, 2000 + 10 * BLOCK_SIZE - 1))), 0)
    assert num_cached(pool, [*prompts["a"], 0]) == 8


def test_a_prefix_that_lost_a_block_in_the_middle_is_mended() -> None:
    """What lies behind the gap is found again once the gap is computed."""
    pool = BlockPool([LayerGroup(None, 16)], BLOCK_SIZE)
    prompt = list(range(17))
    one = computed(pool, prompt)
    pool.shrink(one, 0)
    lost = one.prefix_keys[2]
    pool.blocks[0].withdraw(lost)
    assert num_cached(pool, prompt) == 4
    pool.shrink(computed(pool, prompt), 0)
    assert num_cached(pool, prompt) == 16


def test_withdrawn_blocks_are_found_no_longer() -> None:
    pool = BlockPool([LayerGroup(None, 16)], BLOCK_SIZE)
    one = computed(pool, list(range(10)))
    other = computed(pool, list(range(10)))
    pool.withdraw(other)
    pool.check_integrity([one, other])
    assert num_cached(pool, list(range(10))) == 0
    for each in (one, other):
        pool.shrink(each, 0)
    pool.check_integrity([])
    assert pool.blocks[0].num_free == 16


def test_without_the_cache_nothing_is_kept() -> None:
    pool = BlockPool([LayerGroup(None, 16)], BLOCK_SIZE, enable_prefix_caching=False)
    pool.shrink(computed(pool, list(range(10))), 0)
    assert num_cached(pool, list(range(10))) == 0


def test_tables_stay_in_few_pieces_when_the_cache_is_full() -> None:
    """Sixteen sequences at a time, half of which go on from an earlier one, for a long time."""
    pool = BlockPool([LayerGroup(None, 1024)], BLOCK_SIZE)
    rng = random.Random(0)
    live: list[Sequence] = []
    ended: list[list[int]] = []
    num_tables = num_pieces = num_cached_tokens = 0
    for number in range(600):
        begun = rng.choice(ended[-20:]) if ended and rng.random() < 0.5 else []
        token_ids = begun[:120] + rng.choices(range(10**6), k=rng.randint(4, 80))
        live.append(computed(pool, token_ids))
        num_cached_tokens += live[-1].num_cached_tokens
        for one in live:
            one.token_ids += rng.choices(range(10**6), k=3)
            assert pool.grow(one, one.num_tokens)
            one.num_computed = one.num_tokens - 1
            pool.share(one, one.num_computed)
            if number > 200:
                table = blocks_of(one)
                num_tables += 1
                num_pieces += 1 + sum(b != a + 1 for a, b in itertools.pairwise(table))
        if len(live) == 16:
            one = live.pop(0)
            ended.append(one.token_ids)
            pool.shrink(one, 0)
    pool.check_integrity(live)
    assert num_cached_tokens > 10_000
    assert num_pieces / num_tables < 2.5
