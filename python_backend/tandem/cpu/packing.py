"""Linear layers with their weights laid out for oneDNN once, instead of in every product.

On a CPU this makes the product of a few rows cost little more than that of one, which is what a
verifier pass over drafts lives on. A drafter, whose guesses need not be exact, also gains from
reading fewer bytes.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from tandem.cpu.blocked_matrix import BlockedMatrix
from tandem.cpu.kernels import Operators
from tandem.cpu.kernels.operators import linear as in_graph
from tandem.cpu.tied_embedding import TiedEmbedding, read_from, tied_embedding
from tandem.errors import UnsupportedModelError

# The number of rows that the layout is made for; others work as well.
_ROWS = 16
_linear = torch.ops.mkldnn._linear_pointwise.default
# Products of up to this many rows, and matrices of at least this size, gain from 8 bits.
_INT8_ROWS = 4
_INT8_SIZE = 2**17
# oneDNN keeps the code of 1,024 products, and torch as many descriptions of them: 0.8 MB for each
# number of rows of each matrix's shape. To make one anew takes 0.4 ms, so fewer do.
_KEPT_PRODUCTS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "128"}


def keep_few_products() -> None:
    """Bounds what products leave behind in memory; of use before the process's first one.

    What the environment sets stays.
    """
    for name, number in _KEPT_PRODUCTS.items():
        os.environ.setdefault(name, number)


class PackedLinear(nn.Module):
    """Computes what `linear` computes; keeps only the packed weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)
        self.tile: int | None = None  # rows of each product, which are filled up; any if None
        self._number = -1

    def register(self, operators: Operators) -> None:
        """Gives the weights to the operators of a graph that is going to be made."""
        self._number = operators.add_linear(self.packed, self.bias, tile=self.tile or 0)

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
        if self.tile is None:
            return self._multiply(rows)
        flat = rows.flatten(0, -2)
        filled = pad(flat, (0, 0, 0, -len(flat) % self.tile))
        parts = [self._multiply(part) for part in torch.split(filled, self.tile)]
        return torch.cat(parts)[: len(flat)].view(*rows.shape[:-1], -1)

    def _multiply(self, rows: Tensor) -> Tensor:
        product: Tensor = _linear(rows, self.packed, self.bias, "none", [], "")
        return product


def fix_tiles(model: nn.Module) -> None:
    """Makes a row's results in packed layers independent of what other rows there are.

    oneDNN may compute many rows in another way than few. So all products get the same number of
    rows, whatever is in them.

    Raises:
        UnsupportedModelError: a row's result depends on its place among them.
    """
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    for layer in layers:
        layer.tile = _ROWS
    for layer in {(layer.in_features, layer.out_features): layer for layer in layers}.values():
        rows = torch.randn(_ROWS, layer.in_features, generator=torch.Generator().manual_seed(0))
        rows = rows.to(layer.packed.dtype)
        alone = [layer(row) for row in torch.split(rows, 1)]
        if not torch.equal(layer(rows), torch.cat(alone)):
            raise UnsupportedModelError(
                "batch_invariant: on this processor a row's product with a matrix of "
                f"{layer.out_features} x {layer.in_features} depends on the other rows"
            )


class JoinedLinear(nn.Module):
    """Linear layers that read the same rows, as one packed layer: one product is begun, not three.

    Each of them keeps its place in the model, as a `LinearPart`.
    """

    def __init__(self, linears: Items[nn.Linear]) -> None:
        super().__init__()
        weights: list[Tensor] = [linear.weight.detach() for linear in linears]
        weight = torch.cat(weights)
        joined = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        joined.weight = nn.Parameter(weight, requires_grad=False)
        biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
        if biases:
            joined.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
        self.packed = PackedLinear(joined)
        self._rows: Tensor | None = None
        self._product: Tensor | None = None

    def forward(self, rows: Tensor, start: int, stop: int) -> Tensor:
        """Columns `start` to `stop` of the product, which is made for the first who asks."""
        if self._product is None or self._rows is not rows:
            self._rows, self._product = rows, self.packed(rows)
        part = self._product[..., start:stop]
        if stop == self.packed.out_features:
            self._rows = self._product = None
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
        """`[out_features, in_features]`, unpacked anew on each access."""
        return self.joined.packed.weight[self._start : self._stop]

    def extra_repr(self) -> str:
        """Which part."""
        return f"{self._start}, {self._stop}"

    def forward(self, rows: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        part: Tensor = self.joined(rows, self._start, self._stop)
        return part


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


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN has packed products for this device and type."""
    if device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


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


def pack_linears(
    model: nn.Module,
    keep: nn.Module | None = None,
    *,
    int8: bool = False,
    groups: Items[Items[nn.Linear]] = (),
) -> None:
    """Replaces every `nn.Linear` in `model` but `keep`, which stays as it is.

    Args:
        int8: whether large matrices may be rounded to 8 bits for the product of a few rows.
        groups: layers that always read the same rows, one after the other.
    """
    assert keep is None or not groups
    parts: dict[nn.Module, LinearPart] = {}
    for group in groups:
        joined, start = JoinedLinear(group), 0
        for linear in group:
            parts[linear] = LinearPart(joined, start, start + linear.out_features)
            start += linear.out_features
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if child in parts:
                setattr(module, name, parts[child])
            elif type(child) is nn.Linear and child is not keep:
                rounds = int8 and child.bias is None and child.weight.numel() >= _INT8_SIZE
                setattr(module, name, Int8Linear(child) if rounds else PackedLinear(child))


def pack_model(model: PreTrainedModel, groups: Items[Items[nn.Linear]]) -> None:
    """Packs a model's linear layers, and lets embeddings that are its output head's weights be so.

    Args:
        groups: see `pack_linears`.
    """
    embedding = tied_embedding(model)
    pack_linears(model, groups=groups)
    head = model.get_output_embeddings()
    if embedding is not None and head is not None and (matrix := head_matrix(head)) is not None:
        read_from(embedding, matrix)
    release_file(model)


def release_file(model: nn.Module) -> None:
    """Copies what isn't packed: a single weight in the checkpoint's file keeps all of it mapped."""
    for module in model.modules():
        if not isinstance(module, TiedEmbedding):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.clone()


def pack_drafter(drafter: nn.Module, keep: nn.Module | None = None) -> None:
    """Packs a drafter's linear layers; large ones may be rounded to 8 bits.

    Args:
        keep: see `pack_linears`.
    """
    pack_linears(drafter, keep, int8=True)
    release_file(drafter)


def head_matrix(head: nn.Module) -> BlockedMatrix | None:
    """Where the weights of an output head lie, if that is known.

    Args:
        head: a linear layer, packed or not, or what stands in its place and holds it.
    """
    for module in head.modules():
        if isinstance(module, PackedLinear):
            return module.matrix
    return BlockedMatrix.plain(head.get_parameter("weight").detach())
