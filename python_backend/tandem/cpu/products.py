"""Whose products packed layers use: oneDNN's, or those of `products.cpp`.

oneDNN computes a row in other ways beside many others than alone, which differ in the last bits. In
ours a row is always computed as if it were alone, and few rows cost less.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items

import torch
from torch import Tensor, nn

from tandem.cpu.kernels import load_operators
from tandem.cpu.linear import PackedLinear
from tandem.errors import UnsupportedModelError

# Rows of the products that are timed: one sequence, one with drafts, and several sequences.
_TIMED_ROWS = (1, 4, 16)
# Layers of one shape that are timed, so that weights come from where they do in a pass.
_LAYERS_AT_ONCE = 8
# Counts of rows that are compared with one row.
_TRIED_ROWS = (2, 3, 15, 17, 33, 64)


def use_own_products(model: nn.Module) -> None:
    """Makes a row's results in packed layers independent of what other rows there are.

    Raises:
        UnsupportedModelError: it can't be done for one of the layers.
    """
    if not load_operators():
        raise UnsupportedModelError(
            "batch_invariant: there is no C++ compiler for Tandem's own products"
        )
    layers = _packed(model)
    for layer in layers:
        matrix = layer.matrix
        if matrix is None or matrix.memory.shape[2] == 1 or layer.in_features % 2:
            raise UnsupportedModelError(
                f"batch_invariant: a matrix of {layer.out_features} x {layer.in_features} is "
                "packed in a way that only oneDNN knows, or holds no numbers"
            )
        layer.memory = matrix.memory
    for alike in _by_shape(layers).values():
        _check_rows(alike[0])


def use_onednn(model: nn.Module) -> None:
    """Takes `use_own_products` back."""
    for layer in _packed(model):
        layer.memory = None


@torch.inference_mode()
def cost_of_own_products(model: nn.Module, rounds: int) -> dict[int, float]:
    """What they take longer than oneDNN's, as a share, by the number of rows.

    Args:
        rounds: of each, in turns; the quickest counts.
    """
    shares = {}
    groups = _by_shape(_packed(model)).values()
    for count in _TIMED_ROWS:
        own = others = 0.0
        for layers in groups:
            rows = _rows(layers[0], count)
            some = layers[:_LAYERS_AT_ONCE]
            times = _times([_each(some, rows, own=False), _each(some, rows, own=True)], rounds)
            others += times[0] * len(layers) / len(some)
            own += times[1] * len(layers) / len(some)
        shares[count] = own / others - 1
    return shares


def _packed(model: nn.Module) -> list[PackedLinear]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def _by_shape(layers: Iterable[PackedLinear]) -> dict[tuple[int, int], list[PackedLinear]]:
    shapes = defaultdict(list)
    for layer in layers:
        shapes[layer.in_features, layer.out_features].append(layer)
    return shapes


def _rows(layer: PackedLinear, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(count, layer.in_features, generator=generator)
    return rows.to(layer.packed.dtype)


def _check_rows(layer: PackedLinear) -> None:
    rows = _rows(layer, max(_TRIED_ROWS))
    alone = torch.cat([layer(row) for row in torch.split(rows, 1)])
    for count in _TRIED_ROWS:
        if not torch.equal(layer(rows[:count]), alone[:count]):
            raise UnsupportedModelError(
                "batch_invariant: on this processor a row's product with a matrix of "
                f"{layer.out_features} x {layer.in_features} depends on the other rows"
            )


def _each(layers: Items[PackedLinear], rows: Tensor, *, own: bool) -> Callable[[], None]:
    def run() -> None:
        for layer in layers:
            layer.multiply(rows, own=own)

    return run


def _times(runs: Items[Callable[[], None]], rounds: int) -> list[float]:
    """Seconds of each at best, in turns."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds + 1):
        for run, found in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    # The first of each makes code.
    return [min(found[1:]) for found in times]
