"""Layers of the same reach, which keep and free the K/V of the same tokens."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerGroup:
    """Layers that share block tables, and how many blocks these have.

    Attributes:
        window: how many tokens a query sees, itself included; all if None.
    """

    window: int | None
    num_blocks: int

    @property
    def name(self) -> str:
        """As logs and metrics call it."""
        return "full" if self.window is None else f"window_{self.window}"

    @property
    def num_open(self) -> int:
        """Free blocks among which place decides, not age.

        Long tables profit from it. Those of window groups are short, and need more of the others.
        """
        return self.num_blocks // (2 if self.window is None else 8)

    def first_block(self, num_tokens: int, block_size: int) -> int:
        """The first block that is read behind `num_tokens` tokens, or behind their full blocks.

        An assistant's window is bidirectional and includes both ends, so it reads two tokens more
        than the verifier.
        """
        if self.window is None:
            return 0
        return max(0, num_tokens // block_size * block_size - self.window - 1) // block_size


def windows_of(windows: Iterable[int | None], max_model_len: int) -> list[int | None]:
    """The windows of the groups, that of all tokens first.

    Args:
        windows: of all layers; those that no sequence outgrows count as all tokens.
    """
    found = {None if window is None or window >= max_model_len else window for window in windows}
    return sorted(found, key=lambda window: (window is not None, window or 0))


def group_of(windows: Items[int | None], window: int | None) -> int:
    """The group of a layer with this window.

    Raises:
        ValueError: there is none.
    """
    return windows.index(window if window in windows else None)


def plan_groups(
    windows: Iterable[int | None],
    num_tokens: int,
    block_size: int,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> list[LayerGroup]:
    """Divides a cache for `num_tokens` tokens of context among its groups, for good.

    A window group has what `max_num_seqs` sequences and the largest pass can hold at most, so that
    it never runs out before a group without a window; and a window for each conversation of
    `max_model_len` that the others hold, so that one that rests can go on. It never has more blocks
    than all tokens fill.
    """
    num_blocks = num_tokens // block_size
    groups = []
    for window in windows:
        most = num_blocks
        if window is not None:
            # What is behind the last full block, and where window and pass begin inside a block.
            each = -(-(window + 1) // block_size) + 3
            most = (max_num_seqs + num_tokens // max_model_len) * each
            most += -(-max_num_batched_tokens // block_size)
        groups.append(LayerGroup(window, min(num_blocks, most)))
    return groups
