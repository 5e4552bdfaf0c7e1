"""Which blocks of the KV cache belong to whom, and which hold a prefix that can be used again."""

from __future__ import annotations

import re
from array import array
from collections import OrderedDict
from hashlib import sha256

from tandem.sequence import Sequence

# One block in so many is kept empty while others can be evicted for it.
_EMPTY_SHARE = 8


class BlockPool:
    """Hands out blocks of `block_size` tokens and takes them back.

    A block is in use, by one sequence or by several that begin alike; or cached, which is free but
    holds a prefix that a later sequence may begin with; or empty. Cached blocks are evicted when
    empty ones run short, least recently used first, and of one sequence the last first.

    A block lies at slots `block * block_size` and on. The pool prefers to give a sequence the
    block right after its last one, and starts a new sequence where the largest gap lets it grow:
    attention reads a table that is contiguous in place, and gathers any other. That is why some
    blocks are evicted before they are needed.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_empty = num_blocks
        self._empty = bytearray(b"\1" * num_blocks)
        self._num_users = [0] * num_blocks
        # Blocks that can be shared, in use or cached, by the key of their prefix; and the reverse.
        self._blocks: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # the least recently used first

    @property
    def num_free(self) -> int:
        """Blocks that a sequence can have."""
        return self.num_empty + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that belong to a sequence."""
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill."""
        return -(-num_tokens // self.block_size)

    def missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks that `sequence` lacks to hold `num_tokens` tokens."""
        return max(0, self.blocks_for(num_tokens) - len(sequence.block_table))

    def reuse(self, sequence: Sequence) -> int:
        """Begins a table with the blocks that hold the sequence's prefix; tokens in them.

        The last token is never among them: a pass has to compute it for what comes next.
        """
        assert not sequence.block_table, f"sequence {sequence.id} has blocks already"
        for index in range((sequence.num_tokens - 1) // self.block_size):
            block = self._blocks.get(self._key(sequence, index))
            if block is None:
                break
            self._cached.pop(block, None)
            self._num_users[block] += 1
            sequence.block_table.append(block)
        return len(sequence.block_table) * self.block_size

    def share(self, sequence: Sequence, num_tokens: int) -> None:
        """Offers the full blocks of the first `num_tokens` tokens, which must be committed."""
        if not self.enable_prefix_caching:
            return
        for index in reversed(range(num_tokens // self.block_size)):
            key = self._key(sequence, index)
            if key in self._blocks:  # this block or its like, and so are those before it
                break
            block = sequence.block_table[index]
            self._blocks[key], self._keys[block] = block, key

    def withdraw(self, sequence: Sequence) -> None:
        """Offers the sequence's blocks no longer; who uses them already keeps them."""
        for block in sequence.block_table:
            if (key := self._keys.pop(block, None)) is not None:
                del self._blocks[key]

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Extends the block table to hold `num_tokens`; False, and no change, if it can't."""
        missing = self.missing(sequence, num_tokens)
        if missing > self.num_free:
            return False
        if missing:
            self._evict(missing + self.num_blocks // _EMPTY_SHARE)
        for num_left in range(missing, 0, -1):
            sequence.block_table.append(self._take(sequence.block_table, num_left))
        return True

    def shrink(self, sequence: Sequence, num_tokens: int) -> None:
        """Gives back the blocks behind `num_tokens` tokens; 0 frees the whole table."""
        keep = self.blocks_for(num_tokens)
        for block in reversed(sequence.block_table[keep:]):
            assert self._num_users[block] > 0, f"block {block} freed twice"
            self._num_users[block] -= 1
            if self._num_users[block] == 0:
                self._set_free(block)
        del sequence.block_table[keep:]

    def _set_free(self, block: int) -> None:
        if block in self._keys:
            self._cached[block] = None
        else:
            self._empty[block] = True
            self.num_empty += 1

    def _evict(self, num_empty: int) -> None:
        """Empties cached blocks until there are `num_empty` empty ones, or none is cached."""
        while self._cached and self.num_empty < num_empty:
            block, _ = self._cached.popitem(last=False)
            del self._blocks[self._keys.pop(block)]
            self._set_free(block)

    def _key(self, sequence: Sequence, index: int) -> bytes:
        """Stands for all tokens up to the end of block `index`, in the sequence's namespace.

        It is a digest that nobody can find two prefixes for: who could would read another's text.
        """
        keys = sequence.prefix_keys
        while len(keys) <= index + 1:
            stop = len(keys) * self.block_size
            tokens = array("q", sequence.token_ids[stop - self.block_size : stop])
            keys.append(sha256(keys[-1] + tokens.tobytes()).digest())
        return keys[index + 1]

    def _take(self, table: list[int], num_wanted: int) -> int:
        block = table[-1] + 1 if table else self.num_blocks
        if block >= self.num_blocks or not self._empty[block]:
            block = self._start_of_run(num_wanted)
        self._empty[block] = False
        self.num_empty -= 1
        self._num_users[block] = 1
        return block

    def _start_of_run(self, num_wanted: int) -> int:
        gaps = (gap.span() for gap in re.finditer(b"\1+", self._empty))
        start, stop = max(gaps, key=lambda gap: gap[1] - gap[0])
        # A neighbour on the left may want to grow into this gap: leave it half, if that can be.
        return start if start == 0 else max(start, min((start + stop) // 2, stop - num_wanted))

    def check_integrity(self, sequences: list[Sequence]) -> None:
        """Recounts the pool against the block tables of all sequences that hold blocks."""
        num_users = [0] * self.num_blocks
        for sequence in sequences:
            table = sequence.block_table
            assert len(table) == len(set(table)), "a sequence has a block twice"
            for index, block in enumerate(table):
                num_users[block] += 1
                if block in self._keys:
                    assert (index + 1) * self.block_size <= sequence.num_computed, (
                        f"block {block} is shared, but not committed"
                    )
                    assert self._keys[block] == self._key(sequence, index), (
                        f"block {block} has another prefix's key"
                    )
        assert num_users == self._num_users, "the count of a block's users is wrong"
        assert self._blocks == {key: block for block, key in self._keys.items()}
        cached = {block for block in self._keys if num_users[block] == 0}
        assert cached == set(self._cached), "a cached block is in use, or lost"
        for block, count in enumerate(num_users):
            is_empty = count == 0 and block not in cached
            assert self._empty[block] == is_empty, f"block {block} is in use and empty, or neither"
        assert self.num_empty == sum(self._empty), "the count of empty blocks is wrong"
