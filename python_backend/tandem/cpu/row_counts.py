"""For which numbers of rows a product gives each row the same bits.

A library may compute one row, or many, in another way than a few: sums in another order, other
units of the processor. Which, depends on processor, type and shape, so it is tried.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# All that decoding has, and some of prompts; products of more rows are split.
_FEW = range(1, 65)
_MANY = (65, 80, 96, 127, 128, 129, 192, 255, 256, 257, 384, 511, 512)
# Cheap to fill up to, as a product of few rows costs what reading the matrix costs; and to split
# into fewer would cost that again and again.
_DECODING = 16


Product = Callable[[Tensor], Tensor]


class RowCounts(NamedTuple):
    """From `lowest` to `highest` rows."""

    lowest: int
    highest: int

    def __contains__(self, count: object) -> bool:
        return isinstance(count, int) and self.lowest <= count <= self.highest

    @property
    def are_all(self) -> bool:
        """Whether all that were tried are among them."""
        return self == (_FEW[0], _MANY[-1])


def alike(
    make: Callable[[Tensor], Product], out_features: int, in_features: int, dtype: torch.dtype
) -> RowCounts | None:
    """The most numbers of rows, one after the other, that give the same bits at every place.

    Tried with numbers that add up to nothing: what is left is what rounding left, which any other
    order of the sum shows. With others it would vanish as results are rounded to `dtype`.

    Args:
        make: a weight, `[out_features, in_features]`, to its product, which takes
            `[count, in_features]` to `[count, out_features]`.

    Returns:
        None where there are none that a few rows can be filled up to and many split into.
    """
    generator = torch.Generator().manual_seed(0)
    half = in_features // 2
    order = torch.randperm(half, generator=generator)
    weight = torch.zeros(out_features, in_features)
    weight[:, :half] = torch.randn(out_features, half, generator=generator)
    weight[:, half : 2 * half] = weight[:, order]
    rows = torch.zeros(_MANY[-1], in_features)
    rows[:, :half] = torch.randn(len(rows), half, generator=generator)
    rows[:, half : 2 * half] = -rows[:, order]
    multiply = make(weight.to(dtype))
    rows = rows.to(dtype)
    few = rows[: _FEW[-1]]

    def product(count: int, rows: Tensor) -> Tensor:
        # All the rows, so many at a time; of what is left over, as many again.
        parts = [multiply(part) for part in torch.split(rows, count)]
        left_over = len(rows) % count
        if left_over and len(rows) > count:
            parts[-1] = multiply(rows[-count:])[-left_over:]
        return torch.cat(parts)

    runs: list[RowCounts] = []
    before: Tensor | None = None
    for count in (*_FEW, *_MANY):
        some = few if count in _FEW else rows[:count]
        products = product(count, some)
        at_other_places = product(count, some.roll(len(some) // 2 + 1, 0))
        if not torch.equal(products.roll(len(some) // 2 + 1, 0), at_other_places):
            before = None
            continue
        if before is not None and torch.equal(products[: len(few)], before):
            runs[-1] = RowCounts(runs[-1].lowest, count)
        else:
            runs.append(RowCounts(count, count))
        before = products[: len(few)]
    found = [run for run in runs if _DECODING in run]
    return max(found, key=lambda run: run.highest - run.lowest, default=None)
