"""A matrix as it lies in memory, whole rows of which can be found, whatever lies between.

oneDNN packs a matrix in blocks of rows; within a block, the first few columns of all its rows come
first, then the next. So rows of a packed matrix can be read, and it needn't be kept twice.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

# The blocks that oneDNN has, and how many bytes of a row lie together in them: a pair of two-byte
# elements or one.
_BLOCKS = (64, 48, 32, 16)
_WIDTH_BYTES = 4
# How a shape was found to be packed: all matrices of it are.
_known: dict[tuple[torch.dtype, torch.Size, int], tuple[int, int]] = {}
# Rows that are compared at once.
_CHUNK = 2**14


@dataclass(frozen=True)
class BlockedMatrix:
    """A matrix in blocks of rows.

    Attributes:
        memory: `[num_blocks, num_groups, block, width]`; row n is `memory[n // block, :, n %
            block]`, one after the other. What lies behind the last row and column is no part of
            the matrix.
        shape: rows and columns.
    """

    memory: Tensor
    shape: tuple[int, int]

    @classmethod
    def plain(cls, matrix: Tensor) -> BlockedMatrix:
        """One that isn't packed: `[num_rows, num_columns]`, contiguous."""
        num_rows, num_columns = matrix.shape
        return cls(matrix.view(num_rows, 1, 1, num_columns), (num_rows, num_columns))

    @classmethod
    def packed(cls, packed: Tensor) -> BlockedMatrix | None:
        """One that oneDNN has packed; None if it lies in yet another way, or holds NaN.

        Args:
            packed: its opaque tensor, whose memory is shared.
        """
        size = torch.ops.mkldnn._nbytes(packed)
        memory = (ctypes.c_char * size).from_address(torch.ops.mkldnn.data_ptr(packed))
        memory.owner = packed  # lives as long as its memory is used
        flat = torch.frombuffer(memory, dtype=packed.dtype)
        kind = (packed.dtype, packed.shape, size)
        if kind in _known:
            return cls._of(flat, packed, *_known[kind])
        dense: Tensor = packed.to_dense()
        for width in sorted({_WIDTH_BYTES // dense.itemsize, 1}, reverse=True):
            for block in _BLOCKS:
                if len(flat) % (-(-len(dense) // block) * block * width):
                    continue
                found = cls._of(flat, packed, block, width)
                if found._equals(dense):
                    _known[kind] = block, width
                    return found
        return None

    @classmethod
    def _of(cls, flat: Tensor, packed: Tensor, block: int, width: int) -> BlockedMatrix:
        num_rows, num_columns = packed.shape
        num_blocks = -(-num_rows // block)
        return cls(flat.view(num_blocks, -1, block, width), (num_rows, num_columns))

    def _equals(self, matrix: Tensor) -> bool:
        has_columns = self.memory[0, :, 0].numel() >= self.shape[1]
        return has_columns and all(
            torch.equal(self.rows(start, start + _CHUNK), matrix[start : start + _CHUNK])
            for start in range(0, len(matrix), _CHUNK)
        )

    def rows(self, start: int, stop: int) -> Tensor:
        """Some rows, `[stop - start, num_columns]`, or fewer at the end."""
        block = self.memory.shape[2]
        first = start // block
        blocks = self.memory[first : -(-stop // block)]
        rows = blocks.transpose(1, 2).flatten(0, 1).flatten(1)[:, : self.shape[1]]
        return rows[start - first * block : min(stop, self.shape[0]) - first * block]

    def gather(self, indices: Tensor) -> Tensor:
        """The rows of these numbers, `[..., num_columns]`."""
        block = self.memory.shape[2]
        rows = self.memory[indices // block, :, indices % block]
        return rows.flatten(-2)[..., : self.shape[1]]
