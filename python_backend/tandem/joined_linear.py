"""Linear layers that read the same rows, computed as one; for both wings."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def joinable(model: nn.Module) -> Iterator[list[list[nn.Linear]]]:
    """Sees which linear layers read the same rows in a pass; they are in the list afterwards."""
    groups: list[list[nn.Linear]] = []
    parents = {
        child: parent
        for parent in model.modules()
        for child in parent.children()
        if type(child) is nn.Linear
    }
    calls: list[tuple[nn.Linear, Tensor]] = []

    def note(linear: nn.Linear, arguments: tuple[Tensor, ...]) -> None:
        # Keeps the rows, so that no others can lie in their place.
        calls.append((linear, arguments[0]))

    hooks = [linear.register_forward_pre_hook(note) for linear in parents]
    try:
        yield groups
    finally:
        for hook in hooks:
            hook.remove()
    times = Counter(linear for linear, _ in calls)
    found: dict[tuple[nn.Module, int, bool], list[nn.Linear]] = defaultdict(list)
    for linear, rows in calls:
        if times[linear] == 1:
            found[parents[linear], id(rows), linear.bias is None].append(linear)
    groups += [group for group in found.values() if len(group) > 1]


def join(model: nn.Module, groups: Items[Items[nn.Linear]]) -> None:
    """Lets each of `groups` that is still in `model` be one product.

    Args:
        groups: layers that always read the same rows, one after the other.
    """
    places = {
        child: (module, name)
        for module in model.modules()
        for name, child in module.named_children()
    }
    for group in groups:
        if all(linear in places for linear in group):
            for linear, part in split(joined_in_place(group), group).items():
                module, name = places[linear]
                setattr(module, name, part)


def joined(linears: Items[nn.Linear]) -> nn.Linear:
    """One layer with the outputs of all, one behind the other; either all have a bias or none."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    if biases:
        layer.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return layer


def joined_in_place(linears: Items[nn.Linear]) -> nn.Linear:
    """The same, whose weights these layers go on with as theirs: nothing is held twice."""
    layer, start = joined(linears), 0
    for linear in linears:
        stop = start + linear.out_features
        linear.weight.data = layer.weight.data[start:stop]
        if linear.bias is not None:
            linear.bias.data = layer.bias.data[start:stop]
        start = stop
    return layer


def split(product: nn.Module, linears: Items[nn.Linear]) -> dict[nn.Module, LinearPart]:
    """What takes the place of each of `linears`, which `product` has joined."""
    parts: dict[nn.Module, LinearPart] = {}
    whole = JoinedLinear(product, sum(linear.out_features for linear in linears))
    start = 0
    for linear in linears:
        parts[linear] = LinearPart(whole, start, start + linear.out_features)
        start += linear.out_features
    return parts


class JoinedLinear(nn.Module):
    """Linear layers that read the same rows, as one: one product is begun, not three.

    Each of them keeps its place in the model, as a `LinearPart`.
    """

    def __init__(self, product: nn.Module, out_features: int) -> None:
        """Takes the layer that computes all of them; it has a `weight`."""
        super().__init__()
        self.product: Any = product
        self._out_features = out_features
        self._rows: Tensor | None = None
        self._made: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """`[out_features, in_features]`."""
        weight: Tensor = self.product.weight
        return weight

    def forward(self, rows: Tensor, start: int, stop: int) -> Tensor:
        """Columns `start` to `stop` of the product, which is made for the first who asks."""
        if self._made is None or self._rows is not rows:
            self._rows, self._made = rows, self.product(rows)
        part = self._made[..., start:stop]
        if stop == self._out_features:
            self._rows = self._made = None
        return part


class LinearPart(nn.Module):
    """One of the layers that a `JoinedLinear` joins."""

    def __init__(self, joined: JoinedLinear, start: int, stop: int) -> None:
        super().__init__()
        self.joined = joined
        self._start = start
        self._stop = stop

    @property
    def weight(self) -> Tensor:
        """`[out_features, in_features]`."""
        return self.joined.weight[self._start : self._stop]

    def extra_repr(self) -> str:
        """Which part."""
        return f"{self._start}, {self._stop}"

    def forward(self, rows: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        part: Tensor = self.joined(rows, self._start, self._stop)
        return part
