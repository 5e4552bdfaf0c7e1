"""RMSNorm in one operation instead of nine; see `rms_norm.c`."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from tandem.cpu.kernels.build import library
from tandem.rms_norm import Form, FusedNorm, replace_norms


class FusedRMSNorm(FusedNorm):
    """Computes what a transformers RMSNorm computes."""

    def __init__(self, norm: nn.Module, run: Any, form: Form) -> None:
        """Takes a norm and its form.

        Args:
            norm: the transformers module; it stands in graphs, whose compiler fuses on its own.
            run: the kernel.
        """
        super().__init__(norm, form)
        self._run = run

    def forward(self, rows: Tensor) -> Tensor:
        """`[..., dim]` to the same."""
        if torch.compiler.is_exporting():
            original: Tensor = self.norm(rows)
            return original
        assert self._gain is not None
        rows = rows.contiguous()
        output = torch.empty_like(rows)
        dim = rows.shape[-1]
        self._run(
            rows.data_ptr(),
            output.data_ptr(),
            self._gain.data_ptr(),
            rows.numel() // dim,
            dim,
            self._form.eps,
            self._form.rounds,
            torch.get_num_threads(),
        )
        return output


def fuse_norms(model: nn.Module) -> None:
    """Replaces each RMSNorm in `model` that the kernel computes as well."""
    replace_norms(model, _fused)


def _fused(norm: nn.Module, form: Form) -> FusedRMSNorm | None:
    if form.offset is None:
        return None
    weight = norm.get_parameter("weight")
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
    return FusedRMSNorm(norm, run, form)
