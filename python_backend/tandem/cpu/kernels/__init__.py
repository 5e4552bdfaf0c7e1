"""C and C++ for what torch has no fast operation for on a CPU."""

from tandem.cpu.kernels.attention import AttentionKernel, attention_kernel
from tandem.cpu.kernels.exp_sums import exp_sums
from tandem.cpu.kernels.likeliest import LikeliestToken, likeliest_token
from tandem.cpu.kernels.operators import Operators, load_operators, multiply, operators
from tandem.cpu.kernels.rms_norm import FusedRMSNorm, fuse_norms

__all__ = [
    "AttentionKernel",
    "FusedRMSNorm",
    "LikeliestToken",
    "Operators",
    "attention_kernel",
    "exp_sums",
    "fuse_norms",
    "likeliest_token",
    "load_operators",
    "multiply",
    "operators",
]
