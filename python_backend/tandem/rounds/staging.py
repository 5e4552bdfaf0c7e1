"""Named tables that go to the device, or come from it, in one copy."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Staging:
    """The same tables on both sides, each side in one piece at an address that never changes.

    Attributes:
        host: the tables as arrays, int64 or float64.
        device: the same as tensors.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], floats: frozenset[str], device: torch.device
    ) -> None:
        """Makes tables of zeros.

        Args:
            shapes: by name.
            floats: names of those that hold floats; the others hold integers.
        """
        size = sum(prod(shape) for shape in shapes.values())
        self._host = torch.zeros(size, dtype=torch.long, pin_memory=device.type == "cuda")
        self._device = torch.zeros(size, dtype=torch.long, device=device)
        self.host: dict[str, NDArray[np.int64] | NDArray[np.float64]] = {}
        self.device: dict[str, Tensor] = {}
        start = 0
        for name, shape in shapes.items():
            part = slice(start, start + prod(shape))
            here, there = self._host[part], self._device[part]
            if name in floats:
                here, there = here.view(torch.float64), there.view(torch.float64)
            self.host[name] = here.view(shape).numpy()
            self.device[name] = there.view(shape)
            start = part.stop

    def send(self) -> None:
        """Copies the host's side to the device, behind what has been launched there."""
        self._device.copy_(self._host, non_blocking=True)

    def receive(self) -> None:
        """Copies the device's side to the host, and waits for it: the one read of a step."""
        self._host.copy_(self._device)
