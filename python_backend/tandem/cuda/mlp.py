"""Gated MLPs in three launches instead of five: one product makes gate and factor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from transformers.activations import GELUTanh, SiLUActivation

from tandem.cuda.kernels import gate
from tandem.cuda.pending import Pending, finished
from tandem.joined_linear import joined_in_place

_PARTS = ("gate_proj", "up_proj", "down_proj")
_PROBES = 4
# By rounding alone results may differ so much, relative to the largest.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2**-8, torch.bfloat16: 2**-5}
_TILE = 1024
# Whether it is GELU, and what the kernel then computes.
_ACTIVATIONS: dict[bool, Callable[[Tensor], Tensor]] = {
    False: silu,
    True: partial(gelu, approximate="tanh"),
}


class FusedMLP(nn.Module):
    """Computes `down(act(gate(rows)) * up(rows))`; keeps the first two weights as one."""

    def __init__(self, mlp: nn.Module, *, is_gelu: bool) -> None:
        """Takes a transformers MLP and whether it activates by GELU, else by SiLU."""
        super().__init__()
        first, second, self.down_proj = _linears(mlp)
        self.gate_up_proj = joined_in_place([first, second])
        self._is_gelu = is_gelu

    def forward(self, rows: Tensor) -> Tensor:
        """`[..., hidden_size]` to the same."""
        first, second = self.gate_up_proj(rows).chunk(2, dim=-1)
        product: Tensor = self.down_proj(_gated(first, second, is_gelu=self._is_gelu))
        return product


class FusedActivation(nn.Module):
    """An activation, whose result is pending: it may be multiplied by something."""

    def __init__(self, activation: nn.Module, *, is_gelu: bool) -> None:
        super().__init__()
        self._activation = activation
        self._is_gelu = is_gelu

    def forward(self, rows: Tensor) -> Tensor:
        """`[..., dim]` to the same."""
        return Pending.of(finished(rows), self)

    def finish(self, rows: Tensor) -> Tensor:
        """Computes it as transformers does."""
        activated: Tensor = self._activation(rows)
        return activated

    def join(self, function: Callable[..., Any], rows: Tensor, other: Tensor) -> Tensor | None:
        """Multiplies it; see `Work`."""
        if function is not Tensor.mul:
            return None
        return _gated(rows, other, is_gelu=self._is_gelu)


def _gated(rows: Tensor, factors: Tensor, *, is_gelu: bool) -> Tensor:
    """Activated `rows` times `factors`, both `[..., dim]`, rows of which have a stride."""
    size = rows.shape[-1]
    output = rows.new_empty(rows.shape)
    flat, flat_factors = (_rows_of(each, size) for each in (rows, factors))
    tile = min(_TILE, triton.next_power_of_2(size))
    gate[(len(flat), triton.cdiv(size, tile))](
        flat,
        flat_factors,
        output,
        flat.stride(0),
        flat_factors.stride(0),
        SIZE=size,
        TILE=tile,
        IS_GELU=is_gelu,
        num_warps=4,
    )
    return output


def _rows_of(each: Tensor, size: int) -> Tensor:
    flat = each.reshape(-1, size)
    return flat if flat.stride(1) == 1 else flat.contiguous()


def fuse_mlps(model: nn.Module) -> None:
    """Replaces each gated MLP in `model` that `FusedMLP` computes as well."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("MLP"):
                setattr(module, name, _fused(child) or child)
    # What is left of activations is multiplied elsewhere, or not at all.
    device = next((each.device for each in model.parameters()), None)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) in (GELUTanh, SiLUActivation) and device is not None:
                is_gelu = _is_gelu(child, device)
                if is_gelu is not None:
                    setattr(module, name, FusedActivation(child, is_gelu=is_gelu))


@torch.no_grad()
def _fused(mlp: nn.Module) -> FusedMLP | None:
    """One that gives the same for a few rows."""
    if len(linears := _linears(mlp)) < len(_PARTS):
        return None
    first, second, _ = linears
    weight = first.weight
    is_alike = weight.shape == second.weight.shape and (first.bias is None) == (second.bias is None)
    # No other weights, and no buffers.
    if not is_alike or {name.partition(".")[0] for name in mlp.state_dict()} != set(_PARTS):
        return None
    is_gelu = _is_gelu(getattr(mlp, "act_fn", None), weight.device)
    if weight.dtype not in _TOLERANCE or is_gelu is None:
        return None
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn((1, _PROBES, weight.shape[1]), generator=generator).to(weight)
    expected = mlp(probe)
    module = FusedMLP(mlp, is_gelu=is_gelu)
    difference = (module(probe) - expected).float().abs().max()
    agrees = difference <= _TOLERANCE[weight.dtype] * expected.float().abs().max()
    return module if agrees else None


def _linears(mlp: nn.Module) -> list[nn.Linear]:
    parts = (getattr(mlp, name, None) for name in _PARTS)
    return [each for each in parts if type(each) is nn.Linear]


def _is_gelu(activation: Callable[[Tensor], Tensor] | None, device: torch.device) -> bool | None:
    """Which of the kernel's activations it is; None if neither."""
    if activation is None:
        return None
    values = torch.linspace(-12, 12, 4801, device=device)
    for is_gelu, function in _ACTIVATIONS.items():
        if torch.allclose(activation(values), function(values), rtol=1e-5, atol=1e-6):
            return is_gelu
    return None
