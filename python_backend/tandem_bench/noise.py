"""Who else used the CPU meanwhile: figures of a machine that is busy otherwise are worth little."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import psutil

T = TypeVar("T")

# The share of others above which a figure is worth little.
NOISY = 0.05
_TRIES = 3


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and of all that it started and that still run."""
    process = psutil.Process(pid)
    times = [p.cpu_times() for p in [process, *process.children(recursive=True)]]
    return float(sum(t.user + t.system for t in times))


def undisturbed(pids: Iterable[int], work: Callable[[], T]) -> tuple[T, float]:
    """Measures, and anew while others used the CPU; keeps the least disturbed of three tries.

    Args:
        pids: the processes that are part of what is measured.
        work: measures.

    Returns:
        What `work` returned, and the share of all cores that others used meanwhile.
    """
    watched, tries = list(pids), []
    for _ in range(_TRIES):
        share = foreign_share(watched)
        tries.append((work(), share()))
        if tries[-1][1] <= NOISY:
            break
    return min(tries, key=lambda result: result[1])


def foreign_share(pids: Iterable[int]) -> Callable[[], float]:
    """Starts to watch; the function that comes back says what others used since.

    Args:
        pids: the processes that are part of what is measured.

    Returns:
        The share, 0 to 1, of all cores that other processes used or that the host took away.
    """
    watched = list(pids)

    def busy() -> float:
        times = psutil.cpu_times()
        return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)

    def own() -> float:
        return sum(map(cpu_seconds, watched))

    before, start = busy() - own(), time.monotonic()

    def share() -> float:
        capacity = (time.monotonic() - start) * (psutil.cpu_count() or 1)
        return round(max(0.0, busy() - own() - before) / capacity, 4)

    return share
