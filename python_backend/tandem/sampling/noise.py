"""Noise keyed by (seed, position, token).

Noise for a whole vocabulary would cost more than a verifier pass. It is drawn from the top down
instead (Maddison, Tarlow and Minka, "A* sampling", 2014): first the largest noise of each block of
tokens, then, only where that could win, the noise of the block's tokens given their largest.

The generator is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", 2014), nested: output number `position` of the stream `seed` is the seed of a second
stream, whose output number `token` is the token's noise, and number `-1 - block` its block's.

All is computed in float64 and rounded once, to float32: the logarithms of a CPU and of a GPU differ
in the last digit of a float64, and so the noise is the same to the last bit of a float32, but for
one token in many millions.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Tokens whose noise has a known largest.
BLOCK = 256


def signed(value: int) -> int:
    """The int64 with the same bits as an unsigned number."""
    return value - 2**64 if value >= 2**63 else value


_GAMMA = signed(0x9E3779B97F4A7C15)
_MIX_1 = signed(0xBF58476D1CE4E5B9)
_MIX_2 = signed(0x94D049BB133111EB)


def splitmix64(state: Tensor, index: Tensor) -> Tensor:
    """Output number `index` (from 0) of the SplitMix64 stream that starts at `state`; int64."""
    z = state + (index + 1) * _GAMMA
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own extends the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def block_gumbel(key: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """The largest noise of a block's tokens, and which of them has it (0 to `BLOCK - 1`)."""
    smallest, owner = _block_exponential(key, block)
    return _gumbel(smallest), owner


def gumbel(key: Tensor, token: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, for `token` ids under the row's `key` (broadcast)."""
    smallest, owner = _block_exponential(key, token // BLOCK)
    # An exponential variable that is known to be above m is m and another one.
    others = smallest + _exponential(splitmix64(key, token))
    return _gumbel(torch.where(token % BLOCK == owner, smallest, others))


def _block_exponential(key: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest exponential variable of a block's tokens, and which of them has it."""
    bits = splitmix64(key, -1 - block)
    # The smallest of n exponential variables is one too, n times as small.
    return _exponential(bits) / BLOCK, bits & (BLOCK - 1)


def _exponential(bits: Tensor) -> Tensor:
    """Exponential variables, float64, from the upper halves of `bits`."""
    uniform = (_shift(bits, 32).double() + 0.5) * 2**-32
    return -torch.log(1 - uniform)


def _gumbel(exponential: Tensor) -> Tensor:
    """Gumbel variables, float32, from exponential ones."""
    return -torch.log(exponential).float()
