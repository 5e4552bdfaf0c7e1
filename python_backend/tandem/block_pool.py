"""Which blocks of the KV cache belong to whom; integers only."""

from __future__ import annotations

from tandem.sequence import Sequence


class BlockPool:
    """Hands out blocks of `block_size` tokens and takes them back.

    A block lies at slots `block * block_size` and on. The pool prefers to give a sequence the
    block right after its last one, and starts a new sequence where the largest gap lets it grow:
    attention reads a table that is contiguous in place, and gathers any other.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = [True] * num_blocks
        self.num_free = num_blocks

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

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Extends the block table to hold `num_tokens`; False, and no change, if it can't."""
        missing = self.missing(sequence, num_tokens)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            sequence.block_table.append(self._take(sequence.block_table))
        return True

    def shrink(self, sequence: Sequence, num_tokens: int) -> None:
        """Gives back the blocks behind `num_tokens` tokens; 0 frees the whole table."""
        keep = self.blocks_for(num_tokens)
        for block in sequence.block_table[keep:]:
            assert not self._free[block], f"block {block} freed twice"
            self._free[block] = True
        self.num_free += max(0, len(sequence.block_table) - keep)
        del sequence.block_table[keep:]

    def _take(self, table: list[int]) -> int:
        following = table[-1] + 1 if table else self._start_of_sequence()
        if following >= self.num_blocks or not self._free[following]:
            following = self._start_of_sequence()
        self._free[following] = False
        self.num_free -= 1
        return following

    def _start_of_sequence(self) -> int:
        start, length = self._largest_gap()
        # A neighbour on the left may want to grow into this gap: leave it half.
        return start if start == 0 else start + length // 2

    def _largest_gap(self) -> tuple[int, int]:
        best, length, start = (0, 0), 0, 0
        for block, free in enumerate(self._free):
            if not free:
                length = 0
                continue
            if length == 0:
                start = block
            length += 1
            if length > best[1]:
                best = (start, length)
        assert best[1] > 0, "no block is free"
        return best

    def check_integrity(self, sequences: list[Sequence]) -> None:
        """Recounts the pool against the block tables of all sequences that hold blocks."""
        held = [block for sequence in sequences for block in sequence.block_table]
        assert len(held) == len(set(held)), "a block belongs to two sequences"
        assert all(not self._free[block] for block in held), "a block in use is marked free"
        assert self.num_free == sum(self._free), "the count of free blocks is wrong"
        assert self.num_used == len(held), f"{self.num_used - len(held)} blocks leaked"
