"""The mass of a row's candidates, for probabilities; see `exp_sums.c`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from tandem.cpu.kernels.build import library

_BLOCK = 256
_ROWS_AT_ONCE = 4


def exp_sums(logits: Tensor, rows: Tensor, temperature: Tensor, highest: Tensor) -> Tensor:
    """The sum of `exp(logits[row] / temperature - highest)` for each of `rows`, float32.

    Args:
        logits: `[any, num_candidates]`.
        rows: which of them, `[num_rows]`.
        temperature, highest: of these rows, float32, `[num_rows, 1]`; no quotient is above highest.

    Returns:
        `[num_rows, 1]`.
    """
    num_candidates = logits.shape[1]
    found = library(logits.device, logits.dtype)
    if found is None or num_candidates % _BLOCK or not logits.is_contiguous():
        # In parts: a float32 copy of all logits would be larger than any cache.
        columns = (torch.split(each, _ROWS_AT_ONCE) for each in (rows, temperature, highest))
        parts = [
            (logits[row].float() / divisor - most).exp().sum(dim=-1, keepdim=True)
            for row, divisor, most in zip(*columns, strict=True)
        ]
        return torch.cat(parts)
    run = found.exp_sums
    run.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int] * 3
    run.restype = None
    sums = torch.empty_like(temperature)
    given = (logits, rows.contiguous(), temperature.contiguous(), highest.contiguous())
    run(
        *(tensor.data_ptr() for tensor in (*given, sums)),
        *(len(rows), num_candidates, torch.get_num_threads()),
    )
    return sums
