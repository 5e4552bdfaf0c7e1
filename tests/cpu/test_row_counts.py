"""Which numbers of rows a product may have is found by trying."""

from __future__ import annotations

from functools import reduce

import pytest
import torch
from torch import Tensor

from tandem.cpu.row_counts import Product, RowCounts, alike


def otherwise(terms: Tensor) -> Tensor:
    """The same sums in another order."""
    return usual(terms[..., 0::2]) + usual(terms[..., 1::2])


def usual(terms: Tensor) -> Tensor:
    """One after the other, each rounded."""
    return reduce(torch.add, terms.unbind(dim=-1))


PRODUCTS: dict[str, tuple[Product, RowCounts | None]] = {
    "none depends": (usual, RowCounts(1, 512)),
    "one row is another way": (
        lambda rows: otherwise(rows) if len(rows) == 1 else usual(rows),
        RowCounts(2, 512),
    ),
    "many rows are another way": (
        lambda rows: otherwise(rows) if len(rows) > 32 else usual(rows),
        RowCounts(1, 32),
    ),
    "both": (
        lambda rows: otherwise(rows) if len(rows) > 40 or len(rows) < 9 else usual(rows),
        RowCounts(9, 40),
    ),
    "the fewest may not be many": (
        lambda rows: otherwise(rows) if len(rows) < 20 else usual(rows),
        RowCounts(1, 19),
    ),
    "rows in one place are another way": (
        lambda rows: torch.cat([usual(rows[:-1]), otherwise(rows[-1:])]),
        None,
    ),
    "each depends on the others": (lambda rows: usual(rows) + rows.sum(), None),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", PRODUCTS)
def test_the_widest_range_is_found(name: str, dtype: torch.dtype) -> None:
    product, expected = PRODUCTS[name]

    def make(weight: Tensor) -> Product:
        return lambda rows: product(rows.float().unsqueeze(1) * weight.float()).to(dtype)

    assert alike(make, 8, 300, dtype) == expected


def test_what_is_tried_is_all_there_is() -> None:
    assert RowCounts(1, 512).are_all
    assert not RowCounts(2, 512).are_all
    assert 32 in RowCounts(1, 32)
    assert 33 not in RowCounts(1, 32)
