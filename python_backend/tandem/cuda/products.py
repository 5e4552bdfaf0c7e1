"""Products whose rows don't depend on what other rows there are, for `batch_invariant`.

A library picks a kernel, and the order of its sums, by the number of rows. Here tiles are the same
for any number, and each sums up in one order.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

import torch
import triton
from torch import Tensor, nn

from tandem.cuda.norms import FusedRMSNorm
from tandem.cuda.product_kernels import multiply
from tandem.errors import UnsupportedModelError

_TIMED_ROWS = (1, 4, 16)
# Rows, outputs and elements of a tile: as many rows as tensor cores take at once.
TILE_ROWS, TILE_OUTPUTS, TILE_ELEMENTS = 64, 32, 64
OPTIONS = {"num_warps": 4, "num_stages": 4}


class InvariantLinear(nn.Module):
    """In the place of a linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    @property
    def weight(self) -> Tensor:
        """`[out_features, in_features]`."""
        return self.linear.weight

    def forward(self, rows: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        linear = self.linear
        flat = rows.reshape(-1, linear.in_features)
        if flat.stride(1) != 1:
            flat = flat.contiguous()
        output = flat.new_empty(len(flat), linear.out_features)
        tiles = (
            triton.cdiv(len(flat), TILE_ROWS),
            triton.cdiv(linear.out_features, TILE_OUTPUTS),
        )
        multiply[tiles](
            flat,
            linear.weight,
            linear.bias,
            output,
            len(flat),
            linear.out_features,
            flat.stride(0),
            SIZE=linear.in_features,
            TILE_ROWS=TILE_ROWS,
            TILE_OUTPUTS=TILE_OUTPUTS,
            TILE_ELEMENTS=TILE_ELEMENTS,
            IS_FLOAT32=flat.dtype == torch.float32,
            **OPTIONS,
        )
        return output.reshape(*rows.shape[:-1], -1)


def use_own_products(model: nn.Module) -> None:
    """Replaces all linear layers of a model that has been laid out for the device.

    Raises:
        UnsupportedModelError: the model has norms whose sums are torch's.
    """
    for parent in model.modules():
        for child in parent.children():
            kind = type(child).__name__
            # A fused one keeps what it replaces.
            if kind.endswith("RMSNorm") and FusedRMSNorm not in (type(parent), type(child)):
                raise UnsupportedModelError(
                    f"batch_invariant: {kind} is summed up by torch, whose order depends on the "
                    "number of rows"
                )
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, InvariantLinear(child))


def use_library(model: nn.Module) -> None:
    """Takes `use_own_products` back."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, InvariantLinear):
                setattr(parent, name, child.linear)


@torch.inference_mode()
def costs(model: nn.Module, rounds: int, synchronize: Callable[[], None]) -> dict[int, float]:
    """What they take longer than the library's, as a share, by the number of rows.

    Args:
        rounds: of each, in turns; the quickest counts.
        synchronize: waits for the device.
    """
    shapes: dict[torch.Size, list[InvariantLinear]] = defaultdict(list)
    for module in model.modules():
        if isinstance(module, InvariantLinear):
            shapes[module.weight.shape].append(module)
    found = {}
    for count in _TIMED_ROWS:
        own = library = 0.0
        for layer, *others in shapes.values():
            rows = layer.weight.new_ones(count, layer.linear.in_features)
            times = [
                [_seconds(each, rows, synchronize) for each in (layer, layer.linear)]
                for _ in range(1 + rounds)
            ]
            # The first compiles it.
            quickest = [min(each) for each in zip(*times[1:], strict=True)]
            own += quickest[0] * (1 + len(others))
            library += quickest[1] * (1 + len(others))
        found[count] = own / library - 1 if library else 0.0
    return found


def _seconds(layer: nn.Module, rows: Tensor, synchronize: Callable[[], None]) -> float:
    synchronize()
    start = time.perf_counter()
    layer(rows)
    synchronize()
    return time.perf_counter() - start
