"""Packed linear layers: what they compute, and which layers become what."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from tandem import UnsupportedModelError
from tandem.cpu.linear import Int8Linear, PackedLinear
from tandem.cpu.packing import can_pack, pack_linears
from tandem.cpu.products import use_own_products
from tandem.joined_linear import joinable

pytestmark = pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.float32), reason="no oneDNN in this build of torch"
)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Linear(512, 384, bias=False)
        self.small = nn.Linear(16, 8, bias=False)
        self.biased = nn.Linear(512, 384)
        self.head = nn.Linear(512, 384, bias=False)


def test_exact_unless_8_bits_are_allowed() -> None:
    model = _Model()
    pack_linears(model, model.head)
    kinds = [type(layer) for layer in model.children()]
    assert kinds == [PackedLinear, PackedLinear, PackedLinear, nn.Linear]


def test_only_large_layers_without_bias_are_rounded() -> None:
    model = _Model()
    pack_linears(model, model.head, int8=True)
    kinds = [type(layer) for layer in model.children()]
    assert kinds == [Int8Linear, PackedLinear, PackedLinear, nn.Linear]


@pytest.mark.parametrize("num_rows", [1, 3, 4, 5, 16])
@torch.inference_mode()
def test_products(num_rows: int) -> None:
    linear = nn.Linear(512, 384, bias=False)
    # Rows of very different sizes: each has a scale of its own.
    linear.weight.mul_(torch.logspace(-3, 2, 384).unsqueeze(1))
    rows = torch.randn(1, num_rows, 512)
    exact = linear(rows)
    size = linear.weight.norm(dim=1) * rows.norm(dim=-1, keepdim=True)  # of each sum's terms
    packed_error = (PackedLinear(linear)(rows) - exact).abs() / size
    int8_error = (Int8Linear(linear)(rows) - exact).abs() / size
    assert packed_error.max() < 1e-6
    assert int8_error.max() < 5e-3
    assert (int8_error.max() < 1e-6) == (num_rows > 4)


@torch.inference_mode()
def test_a_weight_of_zeros_stays_zero() -> None:
    linear = nn.Linear(512, 384, bias=False)
    linear.weight.zero_()
    assert torch.equal(Int8Linear(linear)(torch.randn(1, 512)), torch.zeros(1, 384))


def test_weights_can_be_read_back() -> None:
    linear = nn.Linear(512, 384, bias=False)
    assert torch.equal(PackedLinear(linear).weight, linear.weight)
    assert torch.equal(Int8Linear(linear).weight, linear.weight)


# --- layers that read the same rows


class Block(nn.Module):
    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c, self.twice = (
            nn.Linear(16, size, bias=bias) for size in (8, 4, 12, 16)
        )
        self.other = nn.Linear(16, 4, bias=not bias)

    def forward(self, rows: Tensor) -> Tensor:
        again = self.twice(self.twice(rows))
        return torch.cat([self.a(rows), self.b(rows), self.c(again), self.other(rows)], dim=-1)


@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_layers_that_read_the_same_rows_are_joined(bias: bool) -> None:
    model = nn.Sequential(Block(bias=bias), nn.Linear(28, 16), Block(bias=bias))
    rows = torch.randn(5, 16)
    with joinable(model) as groups:
        expected = model(rows)
    first, last = model[0], model[2]
    assert groups == [[first.a, first.b], [last.a, last.b]]
    pack_linears(model, groups=groups)
    assert [type(m).__name__ for m in (first.a, first.b, first.c, first.other)] == [
        *("LinearPart", "LinearPart", "PackedLinear", "PackedLinear")
    ]
    for _ in range(2):
        torch.testing.assert_close(model(rows), expected)
        torch.testing.assert_close(model(2 * rows / 2), expected)


@torch.inference_mode()
def test_a_part_is_never_of_other_rows() -> None:
    """Also where not all ask, in whatever order."""
    linears = [nn.Linear(16, size, bias=False) for size in (8, 4)]
    model = nn.ModuleList(linears)
    pack_linears(model, groups=[linears])
    first, second = torch.randn(2, 3, 16)
    for index, rows in ((0, first), (0, second), (1, first), (1, second), (0, first), (1, first)):
        torch.testing.assert_close(model[index](rows), linears[index](rows))
        torch.testing.assert_close(model[index].weight, linears[index].weight)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("in_features", [16, 640, 2048, 2050])
@torch.inference_mode()
def test_a_row_is_the_same_among_any_others(
    in_features: int, dtype: torch.dtype, bias: bool
) -> None:
    """Which oneDNN's products don't promise."""
    layer = PackedLinear(nn.Linear(in_features, 2040, bias=bias, dtype=dtype))
    use_own_products(nn.ModuleList([layer]))
    rows = torch.randn(300, in_features).to(dtype)
    alone = torch.cat([layer(row) for row in torch.split(rows, 1)])
    for count in (1, 5, 16, 33, 100, 300):
        assert torch.equal(layer(rows[:count]), alone[:count])
        assert torch.equal(layer(rows[None, -count:]), alone[None, -count:])
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        alone, layer.multiply(rows, own=False), rtol=tolerance, atol=tolerance
    )


def test_products_that_depend_on_other_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = PackedLinear.multiply

    def depends(self: PackedLinear, rows: Tensor, *, own: bool) -> Tensor:
        return multiply(self, rows, own=own) + rows.sum()

    monkeypatch.setattr(PackedLinear, "multiply", depends)
    with pytest.raises(UnsupportedModelError, match="8 x 16 depends on the other rows"):
        use_own_products(nn.ModuleList([PackedLinear(nn.Linear(16, 8))]))


@pytest.mark.slow
def test_products_of_many_row_counts_leave_little_in_memory() -> None:
    """A process of its own, as the bound holds from a process's first product on."""
    program = """
import psutil, torch
from tandem.cpu.linear import PackedLinear
from tandem.cpu.packing import keep_few_products
keep_few_products()
layers = [PackedLinear(torch.nn.Linear(256, 256 + 16 * i, bias=False)) for i in range(8)]
sizes = []
with torch.inference_mode():
    for stop in (64, 256):
        for num_rows in range(1, stop):
            rows = torch.ones(num_rows, 256)
            for layer in layers:
                layer(rows)
        sizes.append(psutil.Process().memory_info().rss)
print(sizes[1] - sizes[0])
"""
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert int(output.stdout) < 100e6
