"""Noise keyed by (seed, position, token).

Noise for a whole vocabulary would cost more than a verifier pass. It is drawn from the top down
instead (Maddison, Tarlow and Minka, "A* sampling", 2014): first the largest noise of each block of
tokens, then, only where that could win, the noise of the block's tokens given their largest.

The generator is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", 2014), nested: output number `position` of the stream `seed` is the seed of a second
stream, whose output number `token` is the token's noise, and number `-1 - block` its block's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Tokens whose noise has a known largest.
BLOCK = 256
_MAX_UNIFORM = 1 - 2**-24


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
    bits = splitmix64(key, -1 - block)
    # The largest of n standard Gumbel variables is one too, moved up by log n.
    return math.log(BLOCK) - torch.log(_exponential(bits)), bits & (BLOCK - 1)


def gumbel(key: Tensor, token: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, for `token` ids under the row's `key` (broadcast)."""
    largest, owner = block_gumbel(key, token // BLOCK)
    # A Gumbel variable g that is known to be below m: exp(-g) - exp(-m) is exponential.
    below = -torch.log(torch.exp(-largest) + _exponential(splitmix64(key, token)))
    return torch.where(token % BLOCK == owner, largest, torch.minimum(below, largest))


def _exponential(bits: Tensor) -> Tensor:
    """Exponential variables, float32, from the upper halves of `bits`."""
    uniform = (_shift(bits, 32).float() + 0.5) * 2**-32
    # log1p keeps all digits near 0, where the large values of the noise come from.
    return -torch.log1p(-uniform.clamp_(max=_MAX_UNIFORM))
