"""Linear layers with their weights laid out for oneDNN once, instead of in every product.

The product of a few rows then costs little more than that of one, which is what a verifier pass
over drafts lives on. A drafter, whose guesses need not be exact, also gains from reading fewer
bytes.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from tandem.cpu.blocked_matrix import BlockedMatrix
from tandem.cpu.kernels import Operators, multiply
from tandem.cpu.kernels.operators import linear as in_graph

# The number of rows that the layout is made for; others work as well.
PACKED_ROWS = 16
_linear = torch.ops.mkldnn._linear_pointwise.default
# Products of up to this many rows gain from 8 bits.
_INT8_ROWS = 4


class PackedLinear(nn.Module):
    """Computes what `linear` computes; keeps only the packed weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), PACKED_ROWS)
        self.memory: Tensor | None = None  # set where products are not left to oneDNN
        self._number = -1

    def register(self, operators: Operators) -> None:
        """Gives the weights to the operators of a graph that is going to be made."""
        self._number = operators.add_linear(self.packed, self.bias, memory=self.memory)

    @property
    def weight(self) -> Tensor:
        """`[out_features, in_features]`, unpacked anew on each access."""
        dense: Tensor = self.packed.to_dense()
        return dense

    @cached_property
    def matrix(self) -> BlockedMatrix | None:
        """Where the weights lie, if that is known."""
        return BlockedMatrix.packed(self.packed)

    def forward(self, rows: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        if torch.compiler.is_exporting():
            return in_graph(rows, self._number, self.out_features)
        return self.multiply(rows, own=self.memory is not None)

    def multiply(self, rows: Tensor, *, own: bool) -> Tensor:
        """By Tandem's own product, for which there is `memory`, or by oneDNN's."""
        if own:
            assert self.memory is not None
            return multiply(rows, self.memory, self.bias, self.out_features)
        product: Tensor = _linear(rows, self.packed, self.bias, "none", [], "")
        return product


class Int8Linear(nn.Module):
    """Computes a linear layer from weights in 8 bits, one scale a row, where the rows are few.

    One row costs what reading the weights costs, and these are a quarter of float32's. Results are
    off by about a hundredth, so this is for drafters: guesses need not be exact. For many rows the
    packed layer is faster.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp_(min=1e-12) / 127
        self._scale = scale.bfloat16()
        self._weight = (weight / self._scale.float().unsqueeze(1)).round().clamp_(-127, 127)
        self._weight = self._weight.to(torch.int8)
        self._packed = PackedLinear(linear)
        self._number = -1

    def register(self, operators: Operators) -> None:
        """Gives the weights to the operators of a graph that is going to be made."""
        self._number = operators.add_linear(
            self._packed.packed,
            int8_rows=_INT8_ROWS,
            int8_weight=self._weight,
            int8_scale=self._scale,
        )

    @property
    def weight(self) -> Tensor:
        """`[out_features, in_features]`, unpacked anew on each access."""
        return self._packed.weight

    def forward(self, rows: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        if torch.compiler.is_exporting():
            return in_graph(rows, self._number, self._packed.out_features)
        flat = rows.flatten(0, -2)
        if len(flat) > _INT8_ROWS:
            packed: Tensor = self._packed(rows)
            return packed
        product: Tensor = torch._weight_int8pack_mm(flat.bfloat16(), self._weight, self._scale)
        return product.to(rows.dtype).view(*rows.shape[:-1], -1)
