"""Which slot of the device's state is whose, and what the device knows of its block tables."""

from __future__ import annotations

from collections.abc import Sequence as Items

from tandem.requests.sequence import Sequence


class Slots:
    """Gives each sequence of a round a slot, which it keeps as long as no other needs it.

    A sequence that decodes is in every round, so what lies in its slot stays there. Any other has
    nothing there that is not sent again.
    """

    def __init__(self, num_slots: int, num_groups: int) -> None:
        """Takes the most sequences of a round, and the groups of layers."""
        self._num_groups = num_groups
        self._slots: dict[int, int] = {}  # by sequence; the one that has been given last is last
        self._free = list(range(num_slots))
        self._sent: list[list[list[int]]] = [[] for _ in range(num_slots)]
        self._has_history = [False] * num_slots

    def assign(self, sequences: Items[Sequence]) -> list[int]:
        """The slot of each sequence of a round."""
        present = {sequence.id for sequence in sequences}
        for sequence in sequences:
            if sequence.id not in self._slots:
                slot = self._free.pop() if self._free else self._reclaim(present)
                self._slots[sequence.id] = slot
                self._sent[slot] = [[] for _ in range(self._num_groups)]
                self._has_history[slot] = False
        return [self._slots[sequence.id] for sequence in sequences]

    def _reclaim(self, present: set[int]) -> int:
        unused = next(number for number in self._slots if number not in present)
        return self._slots.pop(unused)

    def lacks_history(self, slot: int) -> bool:
        """Whether a slot that was given anew needs to be told the tokens before this round, once.

        All later ones pass through it.
        """
        lacks, self._has_history[slot] = not self._has_history[slot], True
        return lacks

    def changes(self, sequences: Items[Sequence]) -> list[tuple[int, int, int, int]]:
        """What has changed in the block tables of a round since the device was told.

        Returns:
            Group, slot, index in the table, and block.
        """
        found = []
        for sequence in sequences:
            slot = self._slots[sequence.id]
            for group, table in enumerate(sequence.block_tables):
                sent = self._sent[slot][group]
                # Nobody reads what was given back.
                blocks = table.blocks[table.start :]
                if sent[table.start :] == blocks:
                    continue
                known = sent[table.start : len(table.blocks)]
                known += [-1] * (len(blocks) - len(known))
                found += [
                    (group, slot, table.start + index, block)
                    for index, (block, old) in enumerate(zip(blocks, known, strict=True))
                    if block != old
                ]
                self._sent[slot][group] = list(table.blocks)
        return found
