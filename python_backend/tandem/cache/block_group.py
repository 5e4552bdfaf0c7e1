"""The blocks of one group of layers: which are free, and which hold a prefix."""

from __future__ import annotations

import re
from collections import OrderedDict


class BlockGroup:
    """Hands out blocks and takes them back.

    A block with a key holds the prefix that the key stands for, in use or free, until it is given
    away for other tokens. Open to that are the least recently used blocks, `num_open` if so many
    are free; the others are protected.

    The group prefers to extend a table by the block right after its last one, and begins a table
    where the largest gap lets it grow: attention reads what is contiguous in place, and gathers
    anything else. So among the open blocks place decides: in the strict order of their last use,
    tables would soon be in shreds.
    """

    def __init__(self, num_blocks: int, num_open: int) -> None:
        self.num_blocks = num_blocks
        self._least_open = num_open
        # Blocks that were found by their key and used again, and those that were given away.
        self.num_reused = 0
        self.num_evicted = 0
        self._num_users = [0] * num_blocks
        # A free block is open or protected. The flags are bytes, to be searched for gaps.
        self._open = bytearray(b"\1" * num_blocks)
        self._num_open = num_blocks
        self._protected: OrderedDict[int, None] = OrderedDict()  # the least recently used first
        self._blocks: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be had."""
        return self._num_open + len(self._protected)

    @property
    def num_used(self) -> int:
        """Blocks that are in a table."""
        return self.num_blocks - self.num_free

    def has(self, key: bytes) -> bool:
        """Whether a block holds this prefix."""
        return key in self._blocks

    def reuse(self, key: bytes) -> int:
        """The block that holds this prefix, with one user more."""
        block = self._blocks[key]
        self._use(block)
        return block

    def offer(self, key: bytes, block: int) -> None:
        """Lets the block be found by the key, unless another is."""
        if key not in self._blocks:  # else another sequence has computed the same
            self._blocks[key], self._keys[block] = block, key

    def withdraw(self, key: bytes) -> None:
        """Lets no block be found by the key; who uses it already keeps it."""
        if (block := self._blocks.pop(key, None)) is not None:
            del self._keys[block]
            if block in self._protected:
                del self._protected[block]
                self._set_open(block)

    def extend(self, table: list[int], count: int) -> None:
        """Appends blocks, of which so many must be free."""
        assert count <= self.num_free, f"{count} blocks are wanted and {self.num_free} are free"
        self._open_blocks(count)
        for num_left in range(count, 0, -1):
            table.append(self._take(table, num_left))

    def free(self, block: int, *, protected: bool = True) -> None:
        """Takes a block from one of its users.

        Args:
            protected: whether to keep it for later users if it has a key and no other user.
        """
        assert self._num_users[block] > 0, f"block {block} freed twice"
        self._num_users[block] -= 1
        if self._num_users[block] == 0:
            if protected and block in self._keys:
                self._protected[block] = None
            else:
                self._set_open(block)

    def _use(self, block: int) -> None:
        if self._open[block]:
            self._open[block] = False
            self._num_open -= 1
        self._protected.pop(block, None)
        self._num_users[block] += 1

    def _set_open(self, block: int) -> None:
        self._open[block] = True
        self._num_open += 1

    def _open_blocks(self, num_wanted: int) -> None:
        """Opens blocks, the least recently used first, more than usual if wanted."""
        num_open = max(num_wanted, self._least_open)
        while self._protected and self._num_open < num_open:
            block, _ = self._protected.popitem(last=False)
            self._set_open(block)

    def _take(self, table: list[int], num_wanted: int) -> int:
        block = table[-1] + 1 if table else self.num_blocks
        if block >= self.num_blocks or not self._open[block]:
            block = self._start_of_run(num_wanted)
        if (key := self._keys.pop(block, None)) is not None:
            del self._blocks[key]
            self.num_evicted += 1
        self._use(block)
        return block

    def _start_of_run(self, num_wanted: int) -> int:
        gaps = (gap.span() for gap in re.finditer(b"\1+", self._open))
        start, stop = max(gaps, key=lambda gap: gap[1] - gap[0])
        # A neighbour on the left may want to grow into this gap: leave it half, if that can be.
        return start if start == 0 else max(start, min((start + stop) // 2, stop - num_wanted))

    def check_integrity(self, held: dict[int, list[tuple[bytes, bool]]]) -> None:
        """Recounts the blocks.

        Args:
            held: those in tables, and for each of their users the key of its prefix and whether
                that is committed.
        """
        for block, users in held.items():
            if block in self._keys:
                for key, is_committed in users:
                    assert is_committed, f"block {block} is shared, but not committed"
                    assert self._keys[block] == key, f"block {block} has another prefix's key"
        num_users = [len(held.get(block, ())) for block in range(self.num_blocks)]
        assert num_users == self._num_users, "the count of a block's users is wrong"
        assert self._blocks == {key: block for block, key in self._keys.items()}
        for block, count in enumerate(num_users):
            states = (count > 0, bool(self._open[block]), block in self._protected)
            assert sum(states) == 1, f"block {block} is in use, open and protected: {states}"
        assert self._protected.keys() <= self._keys.keys(), "an empty block is protected"
        assert self._num_open == sum(self._open), "the count of open blocks is wrong"
