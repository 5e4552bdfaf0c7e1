"""Gated MLPs in three launches instead of five: one product makes gate and factor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from tandem.cuda.kernels import gate

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
        first, second, self.down_proj = (mlp.get_submodule(name) for name in _PARTS)
        weights, biases = zip(*((each.weight, each.bias) for each in (first, second)), strict=True)
        self.gate_up_proj = nn.Linear(1, 1, bias=False, device="meta")
        self.gate_up_proj.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
        if biases[0] is not None:
            self.gate_up_proj.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
        self._is_gelu = is_gelu

    def forward(self, rows: Tensor) -> Tensor:
        """`[..., hidden_size]` to the same."""
        joined = self.gate_up_proj(rows)
        size = joined.shape[-1] // 2
        output = joined.new_empty(*joined.shape[:-1], size)
        tile = min(_TILE, triton.next_power_of_2(size))
        gate[(output.numel() // size, triton.cdiv(size, tile))](
            joined, output, SIZE=size, TILE=tile, IS_GELU=self._is_gelu, num_warps=4
        )
        product: Tensor = self.down_proj(output)
        return product


def fuse_mlps(model: nn.Module) -> None:
    """Replaces each gated MLP in `model` that `FusedMLP` computes as well."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("MLP"):
                setattr(module, name, _fused(child) or child)


@torch.no_grad()
def _fused(mlp: nn.Module) -> FusedMLP | None:
    """One that gives the same for a few rows."""
    parts = [getattr(mlp, name, None) for name in _PARTS]
    if not all(type(each) is nn.Linear for each in parts):
        return None
    first, second, _ = parts
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


def _is_gelu(activation: Callable[[Tensor], Tensor] | None, device: torch.device) -> bool | None:
    """Which of the kernel's activations it is; None if neither."""
    if activation is None:
        return None
    values = torch.linspace(-12, 12, 4801, device=device)
    for is_gelu, function in _ACTIVATIONS.items():
        if torch.allclose(activation(values), function(values), rtol=1e-5, atol=1e-6):
            return is_gelu
    return None
