"""The likeliest token from an output head in 8 bits, exactly; see `likeliest.c`."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from tandem.cpu.blocked_matrix import BlockedMatrix
from tandem.cpu.kernels.build import library

_LANES = 16
_CHUNK = 2**14
# Tokens that may come into question, of one state and thread.
_CAPACITY = 2**15
# What sums in float32 may be wrong by, as a share of the product of the norms.
_ROUNDING = 1e-4
# A state is rounded to so many steps on either side of 0.
_STATE_STEPS = 32639


class LikeliestToken:
    """Finds `argmax(head @ state)`, in float32 and with ties to the first token."""

    def __init__(self, run: Any, head: BlockedMatrix) -> None:
        """Rounds the head.

        Args:
            run: the kernel.
            head: `[vocab_size, hidden_size]`; its memory is kept.
        """
        self._run = run
        self._head = head.memory
        vocab_size, dim = head.shape
        self._num_blocks = -(-vocab_size // _LANES)
        self._num_steps = -(-dim // 4)
        shape = (self._num_blocks, self._num_steps, _LANES, 4)
        self._weights = torch.full(shape, 128, dtype=torch.uint8)
        self._scales = torch.zeros(self._num_blocks * _LANES)
        # What only fills the last block never comes into question.
        self._errors = torch.full_like(self._scales, -torch.inf)
        self._norms = torch.zeros_like(self._scales)
        for start in range(0, vocab_size, _CHUNK):
            self._round(start, head.rows(start, start + _CHUNK).float())

    def _round(self, start: int, rows: Tensor) -> None:
        count, dim = rows.shape
        scale = rows.abs().amax(dim=1, keepdim=True).clamp_(min=1e-30) / 127
        rounded = (rows / scale).round()
        error = (rows - rounded * scale).norm(dim=1)
        others = math.sqrt(dim) / (2 * _STATE_STEPS) + _ROUNDING
        stop = start + count
        self._scales[start:stop] = scale[:, 0]
        self._norms[start:stop] = (rounded * scale).norm(dim=1) * (1 + _ROUNDING)
        self._errors[start:stop] = error + others * rows.norm(dim=1)
        blocks = -(-count // _LANES)
        padded = torch.full((blocks * _LANES, self._num_steps * 4), 128, dtype=torch.uint8)
        padded[:count, :dim] = (rounded + 128).to(torch.uint8)
        first = start // _LANES
        self._weights[first : first + blocks] = padded.view(
            blocks, _LANES, self._num_steps, 4
        ).transpose(1, 2)

    def __call__(self, states: Tensor) -> list[int]:
        """The likeliest token behind each of `states`, `[num_rows, hidden_size]`.

        -1 stands for one that isn't finite, or can't tell many tokens apart.
        """
        states = states.contiguous()
        num_rows, dim = states.shape
        _, num_groups, block, width = self._head.shape
        token_ids = (ctypes.c_int64 * num_rows)()
        self._run(
            *(tensor.data_ptr() for tensor in (states, self._head, self._weights)),
            *(tensor.data_ptr() for tensor in (self._scales, self._errors, self._norms)),
            token_ids,
            *(num_rows, dim, num_groups, block, width),
            *(self._num_blocks, self._num_steps, _CAPACITY),
            torch.get_num_threads(),
        )
        return list(token_ids)


def likeliest_token(head: BlockedMatrix) -> LikeliestToken | None:
    """For a head's weight, or None where the processor has no fast products of 8 bits."""
    found = library(head.memory.device, head.memory.dtype)
    run = getattr(found, "likeliest", None)
    if run is None or not head.memory.is_contiguous():
        return None
    run.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_int] * 9
    run.restype = None
    return LikeliestToken(run, head)
