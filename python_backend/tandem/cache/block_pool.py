"""Which blocks of the KV cache belong to whom, and which hold a prefix that can be used again."""

from __future__ import annotations

import re
from array import array
from collections import OrderedDict
from hashlib import sha256

from tandem.requests.sequence import Sequence


class BlockPool:
    """Hands out blocks of `block_size` tokens and takes them back.

    Full, committed blocks have the key of their prefix, by which later sequences find them: in use
    by others, or free, until they are given to a sequence for other tokens. Open to that are the
    least recently used blocks, half of the pool if so many are free; the others are protected.

    A block lies at slots `block * block_size` and on. The pool prefers to give a sequence the
    block right after its last one, and starts a new sequence where the largest gap lets it grow:
    attention reads a table that is contiguous in place, and gathers any other. So among the open
    blocks place decides: in the strict order of their last use, tables would soon be in shreds.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._num_users = [0] * num_blocks
        # A free block is open or protected. The flags are bytes, to be searched for gaps.
        self._open = bytearray(b"\1" * num_blocks)
        self._num_open = num_blocks
        self._protected: OrderedDict[int, None] = OrderedDict()  # the least recently used first
        # Blocks that can be shared by the keys of their prefixes, and the reverse.
        self._blocks: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that a sequence can have."""
        return self._num_open + len(self._protected)

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
            self._use(block)
            sequence.block_table.append(block)
        sequence.num_shared_blocks = len(sequence.block_table)
        return sequence.num_shared_blocks * self.block_size

    def share(self, sequence: Sequence, num_tokens: int) -> None:
        """Offers the full blocks of the first `num_tokens` tokens, which must be committed."""
        if not self.enable_prefix_caching:
            return
        for index in range(sequence.num_shared_blocks, num_tokens // self.block_size):
            key, block = self._key(sequence, index), sequence.block_table[index]
            if key not in self._blocks:  # else another sequence has computed the same
                self._blocks[key], self._keys[block] = block, key
            sequence.num_shared_blocks = index + 1

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
        self._open_blocks(missing)
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
                self._free(block)
        del sequence.block_table[keep:]

    def _use(self, block: int) -> None:
        if self._open[block]:
            self._open[block] = False
            self._num_open -= 1
        self._protected.pop(block, None)
        self._num_users[block] += 1

    def _free(self, block: int) -> None:
        if block in self._keys:
            self._protected[block] = None
        else:
            self._set_open(block)

    def _set_open(self, block: int) -> None:
        self._open[block] = True
        self._num_open += 1

    def _open_blocks(self, num_wanted: int) -> None:
        """Opens blocks, the least recently used first: half of the pool, or more if wanted."""
        num_open = max(num_wanted, self.num_blocks // 2)
        while self._protected and self._num_open < num_open:
            block, _ = self._protected.popitem(last=False)
            self._set_open(block)

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
        if block >= self.num_blocks or not self._open[block]:
            block = self._start_of_run(num_wanted)
        if (key := self._keys.pop(block, None)) is not None:
            del self._blocks[key]
        self._use(block)
        return block

    def _start_of_run(self, num_wanted: int) -> int:
        gaps = (gap.span() for gap in re.finditer(b"\1+", self._open))
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
        for block, count in enumerate(num_users):
            states = (count > 0, bool(self._open[block]), block in self._protected)
            assert sum(states) == 1, f"block {block} is in use, open and protected: {states}"
        assert self._protected.keys() <= self._keys.keys(), "an empty block is protected"
        assert self._num_open == sum(self._open), "the count of open blocks is wrong"
