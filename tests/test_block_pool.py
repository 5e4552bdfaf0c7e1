"""The block pool under any order of growing and shrinking."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tandem import SamplingParams, Sequence
from tandem.block_pool import BlockPool

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
        self.pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
        self.sequences = [sequence(number) for number in range(4)]

    @rule(which=st.integers(0, 3), num_tokens=st.integers(0, NUM_BLOCKS * BLOCK_SIZE + 5))
    def grow(self, which: int, num_tokens: int) -> None:
        table = list(self.sequences[which].block_table)
        free = self.pool.num_free
        grown = self.pool.grow(self.sequences[which], num_tokens)
        after = self.sequences[which].block_table
        assert after[: len(table)] == table
        missing = max(0, -(-num_tokens // BLOCK_SIZE) - len(table))
        assert grown == (missing <= free)
        assert len(after) == len(table) + (missing if grown else 0)
        if all(not other.block_table for i, other in enumerate(self.sequences) if i != which):
            assert not after or not grown or is_contiguous(after) or not is_contiguous(table)

    @rule(which=st.integers(0, 3), num_tokens=st.integers(0, NUM_BLOCKS * BLOCK_SIZE))
    def shrink(self, which: int, num_tokens: int) -> None:
        table = list(self.sequences[which].block_table)
        self.pool.shrink(self.sequences[which], num_tokens)
        assert self.sequences[which].block_table == table[: -(-num_tokens // BLOCK_SIZE)]

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        self.pool.check_integrity(self.sequences)
        held = sum(len(one.block_table) for one in self.sequences)
        assert self.pool.num_used == held
        assert all(0 <= block < NUM_BLOCKS for one in self.sequences for block in one.block_table)

    def teardown(self) -> None:
        for one in self.sequences:
            self.pool.shrink(one, 0)
        assert self.pool.num_used == 0


TestBlockPool = PoolMachine.TestCase


def test_sequences_that_grow_together_stay_contiguous() -> None:
    """Four that take one block at a time, in turns, in a pool with room for all."""
    pool = BlockPool(64, BLOCK_SIZE)
    sequences = [sequence(number) for number in range(4)]
    for num_tokens in range(BLOCK_SIZE, 15 * BLOCK_SIZE + 1, BLOCK_SIZE):
        for one in sequences:
            assert pool.grow(one, num_tokens)
    assert all(is_contiguous(one.block_table) for one in sequences)


def test_freed_blocks_are_used_again() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    one, other = sequence(1), sequence(2)
    assert pool.grow(one, 4 * BLOCK_SIZE)
    assert not pool.grow(other, 1)
    assert other.block_table == []
    pool.shrink(one, BLOCK_SIZE + 1)
    assert pool.grow(other, 2 * BLOCK_SIZE)
    assert pool.num_free == 0


@pytest.mark.parametrize("damage", ["leak", "shared", "count"])
def test_check_integrity_notices(damage: str) -> None:
    pool = BlockPool(8, BLOCK_SIZE)
    one, other = sequence(1), sequence(2)
    pool.grow(one, 8)
    pool.grow(other, 8)
    pool.check_integrity([one, other])
    if damage == "leak":
        one.block_table.pop()
    elif damage == "shared":
        one.block_table[0] = other.block_table[0]
    else:
        pool.num_empty += 1
    with pytest.raises(AssertionError):
        pool.check_integrity([one, other])
