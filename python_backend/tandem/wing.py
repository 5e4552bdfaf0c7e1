"""The one place that chooses a wing: what computes on a kind of device.

Everything else is the same for all devices, and asks the wing. Both have the same methods; a wing
that has nothing better than torch's operations says so with None, or does nothing.
"""

from __future__ import annotations

from functools import cache

import torch

from tandem.cpu.compiler import Compiler
from tandem.cpu.kernels import AttentionKernel, LikeliestToken
from tandem.cpu.wing import CPUWing
from tandem.cuda.round_tools import RoundTools
from tandem.cuda.wing import CUDAWing
from tandem.errors import ConfigError, shorten

__all__ = [
    "AttentionKernel",
    "Compiler",
    "LikeliestToken",
    "RoundTools",
    "Wing",
    "device_of",
    "wing_of",
]

Wing = CPUWing | CUDAWing
_WINGS: dict[str, type[Wing]] = {"cpu": CPUWing, "cuda": CUDAWing}


def device_of(name: str) -> torch.device:
    """What `EngineConfig.device` stands for on this machine.

    Raises:
        ConfigError: no wing is for such a device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {shorten(name)} is not a torch device") from error
    if device.type not in _WINGS:
        raise ConfigError(f"device {name!r}: Tandem computes on {' or '.join(_WINGS)}")
    # Torch takes "cuda:256" for "cuda:0".
    index = int(name.partition(":")[2] or 0)
    if device.type == "cuda" and index >= (count := torch.cuda.device_count()):
        raise ConfigError(f"device {name!r}: this machine has {count} CUDA devices for torch")
    return device


@cache
def wing_of(device: torch.device) -> Wing:
    """The wing for a device; it keeps no state of models."""
    return _WINGS[device.type](device)
