"""The CUDA wing without a GPU: its kernels in the interpreter, everything else on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import psutil

from tandem import wing
from tandem.cuda.wing import CUDAWing


class InterpretedWing(CUDAWing):
    """What asks the card is answered for the machine."""

    def describe(self) -> list[object]:
        return ["interpreter"]

    def synchronize(self) -> None:
        pass

    def free_bytes(self) -> int:
        return psutil.virtual_memory().available

    def cache_bytes(
        self, wanted: int, utilization: float, largest_pass: Callable[[], object]
    ) -> int:
        return wanted


@contextmanager
def cuda_wing() -> Iterator[None]:
    """Engines that load meanwhile, and run, have the CUDA wing."""
    wing.wing_of.cache_clear()
    with patch.dict(wing._WINGS, {"cpu": InterpretedWing}):
        yield
    wing.wing_of.cache_clear()
