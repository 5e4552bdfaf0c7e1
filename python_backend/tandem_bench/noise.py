"""Who else used the CPU meanwhile: figures of a machine that is busy otherwise are worth little."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

import psutil

T = TypeVar("T")

# The share of others above which a figure is worth little.
NOISY = 0.05
_TRIES = 2


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and of all that it started, whether they still run or not."""
    process = psutil.Process(pid)
    times = [p.cpu_times() for p in [process, *process.children(recursive=True)]]
    return float(sum(t.user + t.system + t.children_user + t.children_system for t in times))


def undisturbed(work: Callable[[], T]) -> tuple[T, float]:
    """Measures, and anew while others used the CPU; keeps the less disturbed of two tries.

    Returns:
        What `work` returned, and the share of all cores that others used meanwhile.
    """
    tries = []
    for _ in range(_TRIES):
        share = foreign_share()
        tries.append((work(), share()))
        if tries[-1][1] <= NOISY:
            break
    return min(tries, key=lambda result: result[1])


def foreign_share() -> Callable[[], float]:
    """Starts to watch; the function that comes back says what others used since.

    Returns:
        The share, 0 to 1, of all cores that were used by processes other than this one and those
        that it started, or that the host took away.
    """

    def busy() -> float:
        times = psutil.cpu_times()
        return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)

    def own() -> float:
        return cpu_seconds(os.getpid())

    before, start = busy() - own(), time.monotonic()

    def share() -> float:
        capacity = (time.monotonic() - start) * (psutil.cpu_count() or 1)
        return round(max(0.0, busy() - own() - before) / capacity, 4)

    return share
