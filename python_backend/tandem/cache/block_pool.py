"""Which blocks of the KV cache belong to whom, and which hold a prefix that can be used again."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Sequence as Items
from hashlib import sha256

from tandem.cache.block_group import BlockGroup
from tandem.cache.layer_groups import LayerGroup
from tandem.requests.sequence import GIVEN_BACK, BlockTable, Sequence


class BlockPool:
    """Hands out blocks of `block_size` tokens and takes them back, for each group of layers.

    A sequence has a block table in each group. That of a window group holds only what a later query
    of the sequence can reach. Full, committed blocks have the key of their prefix, by which later
    sequences find them; see `BlockGroup`.

    A block lies at slots `block * block_size` and on of its group's layers.
    """

    def __init__(
        self, groups: Items[LayerGroup], block_size: int, *, enable_prefix_caching: bool = True
    ) -> None:
        self.groups = groups
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.blocks = [BlockGroup(group.num_blocks, group.num_open) for group in groups]

    @property
    def num_used(self) -> int:
        """Blocks that belong to a sequence, of all groups."""
        return sum(blocks.num_used for blocks in self.blocks)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill."""
        return -(-num_tokens // self.block_size)

    def reuse(self, sequence: Sequence) -> int:
        """Begins the tables with the blocks that hold the sequence's prefix; tokens in them.

        A prefix is there if each group has all of it that can be reached from its end. The last
        token is never part of it: a pass has to compute it for what comes next. Nor are those
        behind which a log probability is still to be found.
        """
        tables = self._tables(sequence)
        assert not any(table.blocks for table in tables), f"sequence {sequence.id} has blocks"
        length = self._longest_prefix(sequence)
        for (group, blocks), table in zip(self._all(), tables, strict=True):
            table.start = min(length, group.first_block(length * self.block_size, self.block_size))
            table.blocks[:] = [GIVEN_BACK] * table.start
            for index in range(table.start, length):
                table.blocks.append(blocks.reuse(self._key(sequence, index)))
        sequence.num_shared_blocks = length
        return length * self.block_size

    def count_reuse(self, sequence: Sequence) -> None:
        """Counts what `reuse` found, once the sequence can begin with it."""
        for blocks, table in zip(self.blocks, sequence.block_tables, strict=True):
            blocks.num_reused += sequence.num_shared_blocks - table.start

    def _longest_prefix(self, sequence: Sequence) -> int:
        """Blocks of the longest prefix that is there."""
        if not self.enable_prefix_caching:
            return 0
        longest = 0
        # In each group, the first of the blocks that are there one behind the other.
        starts = [0] * len(self.blocks)
        for index in range(sequence.num_reusable // self.block_size):
            key = self._key(sequence, index)
            length, is_whole = index + 1, True
            for number, (group, blocks) in enumerate(self._all()):
                if not blocks.has(key):
                    if group.window is None:
                        return longest
                    starts[number] = length
                first = group.first_block(length * self.block_size, self.block_size)
                is_whole &= starts[number] <= first and starts[number] < length
            if is_whole:
                longest = length
        return longest

    def share(self, sequence: Sequence, num_tokens: int) -> None:
        """Offers the full blocks of the first `num_tokens` tokens, which must be committed."""
        if not self.enable_prefix_caching:
            return
        for index in range(sequence.num_shared_blocks, num_tokens // self.block_size):
            key = self._key(sequence, index)
            for blocks, table in zip(self.blocks, sequence.block_tables, strict=True):
                if index >= table.start:
                    blocks.offer(key, table.blocks[index])
            sequence.num_shared_blocks = index + 1

    def withdraw(self, sequence: Sequence) -> None:
        """Offers the sequence's prefixes no longer; who uses them already keeps them."""
        for key in sequence.prefix_keys[1:]:
            for blocks in self.blocks:
                blocks.withdraw(key)

    def reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Gets the blocks for `num_tokens` that will not be given back before the sequence ends.

        Returns:
            False, and no change, if they can't be had.
        """
        kept = [num_tokens if group.window is None else 0 for group in self.groups]
        return self._grow(sequence, kept)

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Extends the tables to hold `num_tokens`; False, and no change, if they can't."""
        return self._grow(sequence, [num_tokens] * len(self.groups))

    def _grow(self, sequence: Sequence, num_tokens: Items[int]) -> bool:
        tables = self._tables(sequence)
        missing = [
            max(0, self.blocks_for(wanted) - len(table.blocks))
            for wanted, table in zip(num_tokens, tables, strict=True)
        ]
        if any(n > blocks.num_free for n, blocks in zip(missing, self.blocks, strict=True)):
            return False
        for blocks, table, count in zip(self.blocks, tables, missing, strict=True):
            blocks.extend(table.blocks, count)
        return True

    def release(self, sequence: Sequence, num_tokens: int) -> None:
        """Gives back what no query behind the first `num_tokens` tokens reaches.

        Of an answer that is of little use to others, who go on from its end or from somewhere in
        the prompt.
        """
        for (group, blocks), table in zip(self._all(), sequence.block_tables, strict=True):
            start = min(group.first_block(num_tokens, self.block_size), len(table.blocks))
            for index in range(table.start, start):
                is_prompt = index * self.block_size < sequence.num_prompt_tokens
                blocks.free(table.blocks[index], protected=is_prompt)
                table.blocks[index] = GIVEN_BACK
            table.start = max(table.start, start)

    def shrink(self, sequence: Sequence, num_tokens: int) -> None:
        """Gives back the blocks behind `num_tokens` tokens; 0 frees the whole tables."""
        keep = self.blocks_for(num_tokens)
        for blocks, table in zip(self.blocks, self._tables(sequence), strict=True):
            for block in reversed(table.blocks[max(keep, table.start) :]):
                blocks.free(block)
            del table.blocks[keep:]
            table.start = min(table.start, keep)

    def _all(self) -> Iterator[tuple[LayerGroup, BlockGroup]]:
        return zip(self.groups, self.blocks, strict=True)

    def _tables(self, sequence: Sequence) -> list[BlockTable]:
        if not sequence.block_tables:
            sequence.block_tables = [BlockTable() for _ in self.groups]
        return sequence.block_tables

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

    def check_integrity(self, sequences: list[Sequence]) -> None:
        """Recounts the pool against the block tables of all sequences that hold blocks."""
        for number, blocks in enumerate(self.blocks):
            held: dict[int, list[tuple[bytes, bool]]] = defaultdict(list)
            for sequence in sequences:
                if not sequence.block_tables:
                    continue
                table = sequence.block_tables[number]
                assert all(block == GIVEN_BACK for block in table.blocks[: table.start])
                mine = table.blocks[table.start :]
                assert len(mine) == len(set(mine)), "a sequence has a block twice"
                for index, block in enumerate(mine, table.start):
                    stop = (index + 1) * self.block_size
                    is_committed = stop <= sequence.num_computed
                    key = self._key(sequence, index) if is_committed else b""
                    held[block].append((key, is_committed))
            blocks.check_integrity(held)
