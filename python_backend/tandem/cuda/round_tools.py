"""What rounds on the device are made with: attention, sampling, graphs, and their times."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tandem.cuda.attention import PagedAttention

T = TypeVar("T")


class CUDAGraph(Generic[T]):
    """What a callable launches, captured to be launched as one."""

    def __init__(self, run: Callable[[], T], pool: Any) -> None:
        """Runs it once, so that kernels are compiled, and captures it.

        Args:
            run: reads nothing back, and launches the same whatever tensors hold.
            pool: memory that is shared with other graphs.
        """
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._outputs = run()

    def __call__(self) -> T:
        """Launches it; the same outputs each time, with other contents."""
        self._graph.replay()
        return self._outputs


class RoundTools:
    """For one engine.

    Attributes:
        attend: attention over the block pool.
        choose: samples; see `tandem.cuda.sampling.choose`.
    """

    def __init__(
        self, attend: PagedAttention, choose: Callable[..., Tensor], device: torch.device
    ) -> None:
        self.attend = attend
        self.choose = choose
        self._device = device
        self._pool: Any = None

    def graph(self, run: Callable[[], T]) -> Callable[[], T]:
        """Captures what `run` launches; see `CUDAGraph`.

        All graphs share memory: none needs what another leaves but its outputs.
        """
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return CUDAGraph(run, self._pool)

    def mark(self) -> torch.cuda.Event:
        """A place in the device's work, once it is recorded."""
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def record(self, mark: torch.cuda.Event) -> None:
        """Puts the mark behind what has been launched."""
        mark.record()

    def wait(self, mark: torch.cuda.Event) -> None:
        """Waits until the device has come by the mark, if it was recorded at all."""
        mark.synchronize()

    def seconds_between(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        """What the device took from one mark to another, both of them passed."""
        return float(first.elapsed_time(second)) / 1e3
