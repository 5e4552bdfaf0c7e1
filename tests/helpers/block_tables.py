"""What sequences hold in the block pool."""

from __future__ import annotations

from tandem import Sequence


def blocks_of(sequence: Sequence, group: int = 0) -> list[int]:
    """The blocks of one group that a sequence holds."""
    if not sequence.block_tables:
        return []
    table = sequence.block_tables[group]
    return table.blocks[table.start :]


def num_blocks_of(sequence: Sequence) -> int:
    """How many blocks a sequence holds, of all groups."""
    return sum(len(table.blocks) - table.start for table in sequence.block_tables)
