"""Linear layers with their weights laid out for oneDNN once, instead of in every product.

On a CPU this makes the product of a few rows cost little more than that of one, which is what a
verifier pass over drafts lives on, and a row's result doesn't depend on how many rows there are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# The number of rows that the layout is made for; others work as well.
_ROWS = 16


class PackedLinear(nn.Module):
    """Computes what `linear` computes; keeps only the packed weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)

    @property
    def weight(self) -> Tensor:
        """`[out_features, in_features]`, unpacked anew on each access."""
        dense: Tensor = self._weight.to_dense()
        return dense

    def forward(self, rows: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self._weight, self.bias, "none", [], ""
        )
        return product


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN has packed products for this device and type."""
    if device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def pack_linears(model: nn.Module, keep: nn.Module | None = None) -> None:
    """Replaces every `nn.Linear` in `model` but `keep`, which stays as it is."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child is not keep:
                setattr(module, name, PackedLinear(child))
