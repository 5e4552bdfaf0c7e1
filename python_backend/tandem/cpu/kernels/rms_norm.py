"""RMSNorm in one operation instead of nine; see `rms_norm.c`."""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from tandem.cpu.kernels.build import library

_PROBES = 4
# By rounding alone two ways of summing may differ so much, relative to the result.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


class FusedRMSNorm(nn.Module):
    """Computes what a transformers RMSNorm computes."""

    def __init__(
        self, norm: nn.Module, run: Any, eps: float, *, offset: float, rounds: bool
    ) -> None:
        """Takes the weight of a norm.

        Args:
            norm: the transformers module; it stands in graphs, whose compiler fuses on its own.
            run: the kernel.
            offset: what is added to the weight; 1 in Gemma.
            rounds: whether the quotient is rounded before it is multiplied.
        """
        super().__init__()
        self.norm = norm
        self._run = run
        self._eps = eps
        self._rounds = rounds
        self._gain = self.weight.detach().float() + offset

    @property
    def weight(self) -> Tensor:
        """`[dim]`."""
        return self.norm.get_parameter("weight")

    def forward(self, rows: Tensor) -> Tensor:
        """`[..., dim]` to the same."""
        if torch.compiler.is_exporting():
            original: Tensor = self.norm(rows)
            return original
        rows = rows.contiguous()
        output = torch.empty_like(rows)
        dim = rows.shape[-1]
        self._run(
            rows.data_ptr(),
            output.data_ptr(),
            self._gain.data_ptr(),
            rows.numel() // dim,
            dim,
            self._eps,
            self._rounds,
            torch.get_num_threads(),
        )
        return output


def fuse_norms(model: nn.Module) -> None:
    """Replaces each RMSNorm in `model` that the kernel computes as well."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, _fused(child) or child)


@torch.no_grad()
def _fused(norm: nn.Module) -> FusedRMSNorm | None:
    """One that gives the same for a few rows; a norm says nowhere how it uses its weight."""
    weight = getattr(norm, "weight", None)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    found = library(weight.device, weight.dtype)
    if found is None:
        return None
    run = found.rms_norm
    pointer, number = ctypes.c_void_p, ctypes.c_int
    run.argtypes = [
        *(pointer, pointer, pointer, ctypes.c_int64, number),
        *(ctypes.c_float, number, number),
    ]
    run.restype = None
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn((_PROBES, len(weight)), generator=generator).to(weight.dtype)
    expected = norm(probe)
    for offset, rounds in itertools.product((0.0, 1.0), (False, True)):
        fused = FusedRMSNorm(norm, run, eps, offset=offset, rounds=rounds)
        difference = (fused(probe) - expected).float().abs()
        if bool((difference <= _TOLERANCE[weight.dtype] * expected.float().abs()).all()):
            return fused
    return None
