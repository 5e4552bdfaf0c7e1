"""The CUDA wing without a GPU: what asks the card is answered for the machine."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest.mock import patch

import psutil
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tandem import wing
from tandem.cpu.kernels import attention_kernel
from tandem.cuda.round_tools import RoundTools
from tandem.cuda.sampling import choose
from tandem.cuda.wing import CUDAWing
from tandem.errors import UnsupportedModelError
from tandem.sampling.noise import splitmix64
from tandem.sampling.sample import _Rows, _sample_rows, largest

T = TypeVar("T")


class FakeGraph:
    """Stands where a CUDA graph does: runs a callable again, and keeps its outputs in place."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self._run = run
        self._outputs = run()
        self.num_replays = 0

    def __call__(self) -> Any:
        self.num_replays += 1
        for kept, new in zip(tree_leaves(self._outputs), tree_leaves(self._run()), strict=True):
            if isinstance(kept, Tensor):
                assert kept.shape == new.shape, "a graph's shapes can't change"
                kept.copy_(new)
        return self._outputs


class HostTools(RoundTools):
    """What asks for a stream of the card is answered by the host's clock."""

    def graph(self, run: Callable[[], T]) -> Callable[[], T]:
        return FakeGraph(run)

    def wait(self, mark: Any) -> None:
        pass

    def mark(self) -> Any:
        return [0.0]

    def record(self, mark: Any) -> None:
        mark[0] = time.perf_counter()

    def seconds_between(self, first: Any, second: Any) -> float:
        return float(second[0] - first[0])


class InterpretedWing(CUDAWing):
    """Kernels in the Triton language run in its interpreter, everything else on the CPU."""

    def describe(self) -> list[object]:
        return ["interpreter"]

    def synchronize(self) -> None:
        pass

    def round_tools(self, dtype: torch.dtype) -> RoundTools | None:
        kernel = self.attention_kernel(dtype)
        return None if kernel is None else HostTools(kernel, choose, self._device)

    def free_bytes(self) -> int:
        return psutil.virtual_memory().available

    def release(self) -> None:
        gc.collect()


def choose_as_a_cpu(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperatures: Tensor,
    *limits: Tensor,
    token_ids: Tensor | None = None,
) -> Tensor:
    """What `tandem.cuda.sampling.choose` does, by the CPU's own."""
    chosen, values = largest(logits)
    index = temperatures.nonzero().squeeze(1)
    if len(index):
        columns = (column[index].unsqueeze(1) for column in (temperatures, *limits))
        key = splitmix64(seeds[index], positions[index]).unsqueeze(1)
        ids = None if token_ids is None else token_ids[index]
        chosen[index] = _sample_rows(logits[index], _Rows(index, key, *columns), ids)
    return chosen.where(values.isfinite(), -1)


class QuickWing(InterpretedWing):
    """The same rounds with the CPU's kernels, which are quicker than the interpreter."""

    def prepare(self, model: Any, groups: Any) -> None:
        pass

    def prepare_drafter(self, drafter: Any, keep: Any = None) -> None:
        pass

    def check_attention(self, dtype: torch.dtype) -> None:
        raise UnsupportedModelError("batch_invariant: the CPU's products are not replaced here")

    def attention_kernel(self, dtype: torch.dtype) -> Any:
        return attention_kernel(self._device, dtype)

    def write_kv(self) -> None:
        pass

    def round_tools(self, dtype: torch.dtype) -> RoundTools | None:
        kernel = self.attention_kernel(dtype)
        return None if kernel is None else HostTools(kernel, choose_as_a_cpu, self._device)


@contextmanager
def cuda_wing(kind: type[InterpretedWing] = InterpretedWing) -> Iterator[None]:
    """Engines that load meanwhile, and run, have the CUDA wing."""
    wing.wing_of.cache_clear()
    with patch.dict(wing._WINGS, {"cpu": kind}):
        yield
    wing.wing_of.cache_clear()
