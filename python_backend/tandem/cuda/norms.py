"""RMSNorm in one launch instead of nine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
from torch import Tensor, nn

from tandem.cuda.kernels import rms_norm
from tandem.cuda.pending import Pending, finished
from tandem.rms_norm import Form, FusedNorm, replace_norms


class FusedRMSNorm(FusedNorm):
    """Computes what a transformers RMSNorm computes, each row by itself."""

    def forward(self, rows: Tensor) -> Tensor:
        """`[..., dim]` to the same, which is pending."""
        return Pending.of(finished(rows), self)

    @property
    def form(self) -> Form:
        """How it computes."""
        return self._form

    @property
    def gain(self) -> Tensor | None:
        """What it multiplies by, `[dim]`, float32; None without weight."""
        return self._gain

    def join(self, function: Callable[..., Any], rows: Tensor, other: Tensor) -> Tensor | None:
        """Adds a residual; see `Work`."""
        return self.finish(rows, other.contiguous()) if function is Tensor.add else None

    def finish(self, rows: Tensor, residual: Tensor | None = None) -> Tensor:
        """Computes it, and adds a residual of the same shape, contiguous."""
        dim = rows.shape[-1]
        shaped = in_three_dimensions(rows)
        output = rows.new_empty(rows.shape)
        num_elements = triton.next_power_of_2(dim)
        rms_norm[(rows.numel() // dim,)](
            shaped,
            output,
            self._gain,
            residual,
            self._form.eps,
            shaped.shape[1],
            shaped.stride(0),
            shaped.stride(1),
            DIM=dim,
            NUM_ELEMENTS=num_elements,
            ROUNDS=self._form.rounds,
            num_warps=min(8, max(1, num_elements // 512)),
        )
        return output


def in_three_dimensions(rows: Tensor) -> Tensor:
    """`[..., dim]` as `[num_outer, num_inner, dim]` of contiguous rows, a copy only if need be."""
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    if rows.dim() > 3:
        # A packed row is a batch of one: its heads and tokens stay apart, whichever come first.
        rows = rows.flatten(0, -3)
    while rows.dim() < 3:
        rows = rows.unsqueeze(0)
    return rows


def fuse_norms(model: nn.Module) -> None:
    """Replaces each RMSNorm in `model` that the kernel computes as well."""
    replace_norms(model, FusedRMSNorm)
